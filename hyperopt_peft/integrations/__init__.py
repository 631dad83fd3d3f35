"""Plug-ins of programs that train with a `transformers.Trainer`."""
