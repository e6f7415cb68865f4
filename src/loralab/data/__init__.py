"""Data sets: a spec each (docstrings, python_source, files, hub), prompt masking, collation and the order of samples."""
