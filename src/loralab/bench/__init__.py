"""Speed beside the libraries that people would use instead, in one run: ``loralab bench``.

Each side is a process of its own (``worker``), so that none pays for another's imports or settings.
"""
