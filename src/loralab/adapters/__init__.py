"""Adapters: one file a method, a spec and its modules. They never know the quantizer of the layers they sit on."""
