"""Text tasks of the command line: files, tokens, models, metrics."""
