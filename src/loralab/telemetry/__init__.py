"""What is observed of a run. Callbacks hand plain numbers and rows to the trials; training does not know of them."""
