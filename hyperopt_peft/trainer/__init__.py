"""Two levels driven by `transformers.Trainer`."""
