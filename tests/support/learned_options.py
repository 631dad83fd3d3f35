"""Levels whose learning rate and weight decay are upper variables."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.support.optimizers import BATCHES, f, start, upper_f
from tests.support.quadratic import FunctionLevel


class Learned(FunctionLevel):
    def __init__(self, function: Any, owned: Any, options: Any, **level: Any) -> None:
        self.options = options
        super().__init__(function, owned, **level)

    def optimizer_options(self) -> Any:
        return self.options()


def logs() -> list[Tensor]:
    """Logarithms of the learning rate and of the decay."""
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (-2.0, -1.5)]


def make(
    kind: type[Optimizer],
    options: dict[str, Any],
    grouped: bool = False,
    **level: Any,
) -> tuple[FunctionLevel, Learned]:
    """Levels whose options are the same for both variables, or others for the second one."""
    w, u = start()
    rate, decay = logs()

    def learned() -> Any:
        options = {"lr": rate.exp(), "weight_decay": decay.exp()}
        return [options, {"lr": rate.exp() / 2 + decay.exp() / 9}] if grouped else options

    groups = [{"params": [x]} for x in w] if grouped else w
    upper = FunctionLevel(lambda _: upper_f(w, u), [*u, rate, decay], lr=1.0)
    level |= {"data": BATCHES, "optimizer": kind(groups, **options)}
    return upper, Learned(lambda b: f(w, u, b), w, learned, **level)
