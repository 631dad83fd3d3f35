"""PyTorch mechanics that know nothing of levels."""
