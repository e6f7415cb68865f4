"""What was trained, used: runs opened again, merged, written for other tools, read from them."""
