"""DoRA layers with the row norm in the graph, and a fast forward pass."""
