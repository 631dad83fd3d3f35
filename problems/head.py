"""A linear head on features that are frozen: a convex lower level, solved to its minimum.

    w*(u) = argmin over W, b   f(W, b; u) + ½·λ·‖W − W0‖²,    logits = x·W + b

x are the features of a row, or of a token. f is the loss of any level over the model `Head`, such
as `Mixture` or `Weighted`; W0 is 0, or where another training ended. At the minimum the implicit
function theorem holds, so that a solver with exact products gives the hypergradient to its
tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from transformers.modeling_outputs import SequenceClassifierOutput

from hyperopt_peft.core.logits import losses_of_logits
from hyperopt_peft.core.problem import Problem

#: λ, of features with mean 0 and deviation 1.
L2 = 0.1
#: The largest entry of the gradient at a minimum, and the most steps to it.
TOLERANCE, STEPS = 1e-4, 500


class Head(nn.Module):
    """Logits x·W + b and the mean loss of ``labels``, as a model of Transformers returns them.

    Args:
        size: the number of features of a row.
        outputs: the number of classes, or of numbers to predict.
        problem_type: as in the configuration of a Transformers model; it tells several labels a
            row from numbers.
        dtype: of W and b, that of the features.

    Example:
        >>> head = Head(3, 2)
        >>> head(torch.ones(4, 3), torch.tensor([0, 1, 0, 1])).loss
        tensor(0.6931, grad_fn=...)
    """

    def __init__(
        self,
        size: int,
        outputs: int,
        *,
        problem_type: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(problem_type=problem_type)
        self.weight = nn.Parameter(torch.zeros(size, outputs, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """The logits ``(n, C)`` of ``features`` ``(n, d)``; with ``labels`` their mean loss too."""
        logits, loss = features @ self.weight + self.bias, None
        if labels is not None:
            losses, scored = losses_of_logits(self, logits, labels, shifted=False)
            loss = losses.sum() / scored.sum().clamp(min=1)
        return SequenceClassifierOutput(loss, logits)


class L2Penalty:
    """½·λ·‖W − W0‖², the prior of a level over ``head``; the bias is free.

    Args:
        head: the head.
        l2: λ.
        near: whether W0 is the present W, which keeps a training near where another one ended;
            else 0.

    Example:
        >>> head = Head(2, 1)
        >>> L2Penalty(head, l2=3.0)([head.weight + 1, head.bias])
        tensor(3., grad_fn=...)
    """

    def __init__(self, head: Head, l2: float = L2, *, near: bool = False) -> None:
        self.l2 = l2
        self.center = head.weight.detach().clone() if near else torch.zeros_like(head.weight)

    def __call__(self, variables: Sequence[Tensor]) -> Tensor:
        """The penalty at ``variables``, W first."""
        return self.l2 / 2 * (variables[0] - self.center).square().sum()


def solve(level: Problem, batch: Any, *, tolerance: float = TOLERANCE, steps: int = STEPS) -> int:
    """Take ``level``'s variables to the minimum of its loss on ``batch``, by L-BFGS.

    Nocedal 1980, doi:10.1090/S0025-5718-1980-0572855-7, with a strong Wolfe line search; it begins
    at the present values. Returns the number of evaluations.

    Args:
        level: a level over a `Head`, or another convex one.
        batch: all of its rows.
        tolerance: the largest absolute entry of the gradient at the end.
        steps: the most steps; where they do not suffice, the last point is kept.

    Raises:
        NonFiniteError: the loss or the gradient is NaN or infinite.

    Example:
        >>> from hyperopt_peft.problems.common import TaskLevel
        >>> head, x = Head(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> variables = head.named_parameters()
        >>> level = TaskLevel(head, variables, prior=L2Penalty(head))
        >>> evaluations = solve(level, {"features": x, "labels": torch.tensor([0, 1])})
        >>> bool(level.gradient({"features": x, "labels": torch.tensor([0, 1])},
        ...                     level.variables).norms[0] < 1e-3)
        True
    """
    optimizer = LBFGS(
        level.variables,
        max_iter=steps,
        max_eval=2 * steps,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        evaluation = level.gradient(batch, level.variables)
        for variable, slope in zip(level.variables, evaluation.gradient, strict=True):
            variable.grad = slope
        return evaluation.loss

    optimizer.step(closure)
    optimizer.zero_grad()
    return evaluations
