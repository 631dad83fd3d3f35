"""A network whose layers are two levels, each with rows of its own that have weights."""

from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft import Engine
from tests.support.attributed import ROWS, RowWeighted, network

STEPS = 6


def level(
    net: nn.Sequential, weights: Tensor, layer: int, rows: Tensor, share: slice
) -> RowWeighted:
    optimizer = torch.optim.Adam(net[layer].parameters(), lr=0.02)
    return RowWeighted(
        net,
        weights,
        list(net[layer].named_parameters(prefix=str(layer))),
        data=[batch[share] for batch in rows.split(4)],
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        max_grad_norm=0.5,
    )


def engine(
    weights: Tensor, hypergradient: str = "direct", *, dropout: float = 0.2, share: slice = slice(4)
) -> Engine:
    """``share`` of each batch of four rows is this process's share."""
    net = network(dropout)
    lower = level(net, weights, 0, torch.arange(8), share)
    upper = level(net, weights, 3, torch.arange(8, ROWS), share)
    return Engine(upper, lower, hypergradient, lower_steps=2, warmup_steps=1, progress=False)


def evaluation_of(levels: Engine) -> Any:
    net, x = levels.lower.net, torch.ones(2, 3, dtype=torch.float64)  # type: ignore[attr-defined]
    return lambda: net[3](net[1](net[0](x))).square().mean()
