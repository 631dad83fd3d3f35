"""What the autograd graph of a loss tells about how it was computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graph that leads to ``tensors``, once."""
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [parent for parent, _ in node.next_functions]


def is_half(node: Any) -> bool:
    """Whether the node's result is in bfloat16 or float16."""
    return any(output.dtype in HALF for output in getattr(node, "_input_metadata", ()))
