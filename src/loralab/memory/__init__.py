"""Memory measured, limited and told."""
