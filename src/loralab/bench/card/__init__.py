"""``make gpu``: all that needs a CUDA card, in one command of at most nine minutes and without a network."""
