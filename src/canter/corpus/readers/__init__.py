"""Readers: ``read_NAME(path, options)`` yields the number and content of every row, in the file's order."""
