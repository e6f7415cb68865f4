"""Data sets (docstrings, python_source, files, hub), prompt masking, collation, the order of samples."""
