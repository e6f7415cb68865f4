"""Memory of a run: measured phase by phase, limited, and reported."""
