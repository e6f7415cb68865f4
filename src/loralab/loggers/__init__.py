"""Where a trial's numbers go: metrics.jsonl is the truth, Weights & Biases its mirror."""
