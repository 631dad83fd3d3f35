"""Priors: terms of a level's objective that depend on its variables and on no batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.validation import is_number
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.distributed import gather, sharded_like
from hyperopt_peft.utils.vector import widened

#: The weight τ of a `GaussianPrior`, or a function from the variables to a scalar.
Prior = float | Callable[[Sequence[Tensor]], Tensor]


class GaussianPrior:
    """½·τ·mean‖u − u0‖²; the mean is over all entries of all variables, u0 the initial values.

    The prior is the negative logarithm of a Gaussian density around u0, without its constant. On
    an adapter's variables it is L2-SP (Li, Grandvalet & Davoine 2018, arXiv:1802.01483, Eq. 2).

    Args:
        weight: τ, in units of the loss divided by squared units of u.
        variables: u; their current values are u0.

    Example:
        >>> u = torch.zeros(4)
        >>> prior = GaussianPrior(3.0, [u])
        >>> prior([u + 2])
        tensor(6.)
    """

    def __init__(self, weight: float, variables: Sequence[Tensor]) -> None:
        self.weight = float(weight)
        self.start = tuple(variable.detach().clone() for variable in variables)

    def __call__(self, variables: Sequence[Tensor]) -> Tensor:
        """The prior at ``variables``, a scalar with its autograd graph."""
        pairs = zip(variables, self.start, strict=True)
        squares = [(widened(u) - widened(sharded_like(u0, u))).square().sum() for u, u0 in pairs]
        sums = [gather(square).to(squares[0].device) for square in squares]
        return self.weight / 2 * torch.stack(sums).sum() / sum(u.numel() for u in variables)

    def state_dict(self) -> dict[str, Any]:
        """Copies of u0."""
        return {"start": [start.clone() for start in self.start]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore u0 from a result of `state_dict`."""
        for start, saved in zip(self.start, state["start"], strict=True):
            start.copy_(saved)


def as_prior(
    prior: Prior | None, variables: Sequence[Tensor], level: str
) -> Callable[[Sequence[Tensor]], Tensor] | None:
    """``prior`` as a function of the variables; a number is the weight of a `GaussianPrior`."""
    if prior is None or callable(prior):
        return prior
    if not is_number(prior) or not 0 <= prior < math.inf:
        raise ProblemError(
            f"{level}: prior must be a number ≥ 0 or a function of the variables, got {prior!r}"
        )
    return GaussianPrior(prior, variables)


def prior_value(
    prior: Callable[[Sequence[Tensor]], Tensor], variables: Sequence[Tensor], level: str
) -> Tensor:
    """``prior`` at ``variables``, a scalar with its autograd graph."""
    value = prior(variables)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ProblemError(
            f"{level}: prior must return a scalar tensor, got {shape}; return a mean or a sum"
        )
    return gather(value).reshape(())
