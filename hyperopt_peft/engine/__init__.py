"""The plain training loop over two levels."""
