"""One pack from its check to its records."""
