"""Frozen linear layers that hold their weight in few bits, and the hook that fills them while a model
loads.
"""
