"""Which trials share a pass through the frozen base: pure functions over what a launcher knows of them."""
