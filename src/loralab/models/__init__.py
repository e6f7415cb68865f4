"""Base models: their spec, loading and what they accept."""
