"""DoRA's layer: its norm in the graph, and a fast form."""
