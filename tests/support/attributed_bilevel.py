"""A network whose layers are two levels, each with rows of its own that have weights."""

from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft import Engine, Problem

ROWS, STEPS = 12, 6


class RowWeighted(Problem):
    """1/B Σ v_i (net(x_i) − y_i)² over row numbers; two levels of one network."""

    def __init__(
        self, net: nn.Module, weights: Tensor, named: Any, rows: Tensor, share: slice
    ) -> None:
        source = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 3, generator=source, dtype=torch.float64)
        self.y = torch.randn(ROWS, generator=source, dtype=torch.float64)
        self.net, self.weights = net, weights
        named = list(named)
        optimizer = torch.optim.Adam([p for _, p in named], lr=0.02)
        super().__init__(
            named,
            data=[batch[share] for batch in rows.split(4)],
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            max_grad_norm=0.5,
        )

    def loss(self, rows: Tensor) -> Tensor:
        each = (self.net(self.x[rows]).squeeze(-1) - self.y[rows]).square()
        return (self.weights[rows] * each).mean()


def engine(
    weights: Tensor, hypergradient: str = "direct", *, dropout: float = 0.2, share: slice = slice(4)
) -> Engine:
    """``share`` of each batch of four rows is this process's share."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()
    first, last = net[0].named_parameters(prefix="0"), net[3].named_parameters(prefix="3")
    lower = RowWeighted(net, weights, first, torch.arange(8), share)
    upper = RowWeighted(net, weights, last, torch.arange(8, ROWS), share)
    return Engine(upper, lower, hypergradient, lower_steps=2, warmup_steps=1, progress=False)


def evaluation_of(levels: Engine) -> Any:
    net, x = levels.lower.net, torch.ones(2, 3, dtype=torch.float64)  # type: ignore[attr-defined]
    return lambda: net[3](net[1](net[0](x))).square().mean()


def ones() -> Tensor:
    return torch.ones(ROWS, dtype=torch.float64, requires_grad=True)
