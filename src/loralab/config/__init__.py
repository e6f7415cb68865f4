"""Hydra's configuration to checked specs; trial ids."""
