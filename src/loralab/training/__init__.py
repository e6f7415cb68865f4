"""What one trial is, and the LightningModule that trains several."""
