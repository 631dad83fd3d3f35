"""PyTorch mechanics that are independent of levels."""
