"""Which trials run together, in which order and where."""
