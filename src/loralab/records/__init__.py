"""Everything that is written: records, metrics, locks, fingerprints, W&B."""
