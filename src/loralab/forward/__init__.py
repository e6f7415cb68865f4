"""One stacked pass of a pack over the frozen base."""
