"""Ridge regression with a penalty for each feature (diabetes), which has a closed form.

upper: min over l   ½ mean (X_val w* − y_val)²
lower: w*(l) = argmin over w   ½ mean (X w − y)² + ½ Σ_j exp(l_j) w_j²
     = (XᵀX/n + diag exp l)⁻¹ Xᵀy/n
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import Tensor

from hyperopt_peft.method import Problem


class Ridge(Problem):
    """Lower level: min over w ``(d,)`` of ½ mean (Xw − y)² + ½ Σ_j exp(l_j) w_j²."""

    def __init__(self, w: Tensor, log_penalty: Tensor, x: Tensor, y: Tensor) -> None:
        self.w, self.log_penalty, self.x, self.y = w, log_penalty, x, y
        super().__init__([("w", w)], optimizer=torch.optim.SGD([w], lr=0.4))

    def loss(self, batch: None) -> Tensor:
        """½ mean (Xw − y)² + ½ Σ_j exp(l_j) w_j²."""
        penalty = self.log_penalty.exp() @ self.w.square()
        return (self.x @ self.w - self.y).square().mean() / 2 + penalty / 2

    @torch.no_grad()
    def solve(self) -> None:
        """w = (XᵀX/n + diag exp l)⁻¹ Xᵀy/n."""
        gram = self.x.T @ self.x / len(self.x) + torch.diag(self.log_penalty.exp())
        self.w.copy_(torch.linalg.solve(gram, self.x.T @ self.y / len(self.x)))


class RidgeValidation(Problem):
    """Upper level: min over the log penalties l ``(d,)`` of ½ mean (X_val w − y_val)²."""

    def __init__(self, log_penalty: Tensor, w: Tensor, x: Tensor, y: Tensor) -> None:
        self.w, self.x, self.y = w, x, y
        optimizer = torch.optim.Adam([log_penalty], lr=0.1)
        super().__init__([("log_penalty", log_penalty)], optimizer=optimizer)

    def loss(self, batch: None) -> Tensor:
        """½ mean (X_val w − y_val)²."""
        return (self.x @ self.w - self.y).square().mean() / 2


def diabetes(log_penalty: float = -2.0) -> tuple[RidgeValidation, Ridge]:
    """The two levels on scikit-learn's diabetes data in float64, split 60/40, standardised.

    Initially w = 0, and every l_j is ``log_penalty``.

    Example:
        >>> upper, lower = diabetes()
        >>> lower.solve()
        >>> bool(lower.gradient(None, lower.variables).gradient[0].abs().max() < 1e-12)
        True
    """
    x, x_val, y, y_val = split(*load_diabetes(return_X_y=True))
    y, y_val = standardised(y, y_val)
    w = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    penalties = torch.full_like(w, log_penalty, requires_grad=True)
    return RidgeValidation(penalties, w, x_val, y_val), Ridge(w, penalties, x, y)


def split(*arrays: Any) -> tuple[Tensor, ...]:
    """(x, x_val, y, y_val) of x and y in float64, split 60/40, with x standardised."""
    parts = train_test_split(*arrays, test_size=0.4, random_state=0)
    x, x_val, *labels = (torch.from_numpy(part).double() for part in parts)
    return *standardised(x, x_val), *labels


def standardised(train: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(x − mean)/std of both, with each column's mean and standard deviation in ``train``.

    A column that is constant in ``train`` is divided by 1.
    """
    mean, std = train.mean(0), train.std(0, correction=0)
    std = std.where(std > 0, torch.ones_like(std))
    return (train - mean) / std, (other - mean) / std
