"""A network whose layers are two levels, each with rows of its own that have weights."""

from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft import Engine
from tests.support.attributed import ROWS, RowWeighted

STEPS = 6


def level(net: nn.Module, weights: Tensor, layer: int, rows: Tensor, share: slice) -> RowWeighted:
    """The level of one layer of ``net``."""
    named = list(net[layer].named_parameters(prefix=str(layer)))
    optimizer = torch.optim.Adam([p for _, p in named], lr=0.02)
    options: dict[str, Any] = {"data": [batch[share] for batch in rows.split(4)]}
    options["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return RowWeighted(net, weights, named, optimizer=optimizer, max_grad_norm=0.5, **options)


def engine(
    weights: Tensor, hypergradient: str = "direct", *, dropout: float = 0.2, share: slice = slice(4)
) -> Engine:
    """``share`` of each batch of four rows is this process's share."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()
    lower = level(net, weights, 0, torch.arange(8), share)
    upper = level(net, weights, 3, torch.arange(8, ROWS), share)
    return Engine(upper, lower, hypergradient, lower_steps=2, warmup_steps=1, progress=False)


def evaluation_of(levels: Engine) -> Any:
    net, x = levels.lower.net, torch.ones(2, 3, dtype=torch.float64)  # type: ignore[attr-defined]
    return lambda: net[3](net[1](net[0](x))).square().mean()


def ones() -> Tensor:
    return torch.ones(ROWS, dtype=torch.float64, requires_grad=True)
