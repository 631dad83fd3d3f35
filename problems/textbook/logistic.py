"""Logistic regression with a penalty for each feature (breast cancer).

upper: min over l   mean softplus(−y_val X_val w*)
lower: w*(l) = argmin over w   mean softplus(−y X w) + ½ Σ_j exp(l_j) w_j²
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.nn.functional import softplus

from hyperopt_peft.method import Problem
from hyperopt_peft.problems.textbook.ridge import split


class Logistic(Problem):
    """Lower level: min over w ``(d,)`` of mean softplus(−y Xw) + ½ Σ_j exp(l_j) w_j²."""

    def __init__(self, w: Tensor, log_penalty: Tensor, x: Tensor, y: Tensor) -> None:
        self.w, self.log_penalty, self.x, self.y = w, log_penalty, x, y
        super().__init__([("w", w)], optimizer=torch.optim.SGD([w], lr=1.0))

    def loss(self, batch: None) -> Tensor:
        """Mean softplus(−y Xw) + ½ Σ_j exp(l_j) w_j²."""
        penalty = self.log_penalty.exp() @ self.w.square()
        return softplus(-self.y * (self.x @ self.w)).mean() + penalty / 2


class LogisticValidation(Problem):
    """Upper level: min over the log penalties l ``(d,)`` of mean softplus(−y_val X_val w)."""

    def __init__(self, log_penalty: Tensor, w: Tensor, x: Tensor, y: Tensor) -> None:
        self.w, self.x, self.y = w, x, y
        optimizer = torch.optim.Adam([log_penalty], lr=0.1)
        super().__init__([("log_penalty", log_penalty)], optimizer=optimizer)

    def loss(self, batch: None) -> Tensor:
        """Mean softplus(−y_val X_val w)."""
        return softplus(-self.y * (self.x @ self.w)).mean()


def breast_cancer(log_penalty: float = -2.0) -> tuple[LogisticValidation, Logistic]:
    """The two levels on scikit-learn's breast cancer data in float64, split 60/40, labels ±1.

    Initially w = 0, and every l_j is ``log_penalty``.

    Example:
        >>> upper, lower = breast_cancer()
        >>> upper.variables[0].shape, lower.variables[0].shape
        (torch.Size([30]), torch.Size([30]))
    """
    x, x_val, y, y_val = split(*load_breast_cancer(return_X_y=True))
    w = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    penalties = torch.full_like(w, log_penalty, requires_grad=True)
    y, y_val = 2 * y - 1, 2 * y_val - 1
    return LogisticValidation(penalties, w, x_val, y_val), Logistic(w, penalties, x, y)
