"""One small module for each format: ``read_NAME(path, ...)`` yields utterances and problems, in the
file's order."""
