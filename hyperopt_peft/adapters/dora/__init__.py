"""DoRA layers that differentiate through the row norm, and a fast forward pass."""
