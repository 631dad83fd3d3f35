"""Values of levels as one vector, and a rate of gradient descent."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

SGD = partial(torch.optim.SGD, lr=0.1)


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


@torch.no_grad()
def assign(level: Any, values: Tensor) -> None:
    parts = values.split([x.numel() for x in level.variables])
    for variable, part in zip(level.variables, parts, strict=True):
        variable.copy_(part.view_as(variable))
