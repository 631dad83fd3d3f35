"""Data hyper-cleaning: a weight for each training image, learned on clean images (digits).

    upper: min over x   mean CE(W*; clean images)
    lower: W*(x) = argmin over W   mean σ(x_i) CE_i(W; images with partly random labels) + 0.02 ‖W‖²

Franceschi et al. 2017, arXiv:1703.01785 §5.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy

from hyperopt_peft.method import Problem
from hyperopt_peft.problems.textbook.ridge import standardised


@dataclass(frozen=True)
class Digits:
    """Standardised pixels ``x`` ``(n, 64)`` and labels ``y`` ``(n,)`` of the three parts.

    ``redrawn`` ``(n_train,)`` is true where the training label was replaced by a random one.
    """

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    redrawn: Tensor


class WeightedImages(Problem):
    """Lower level: min over W ``(64, 10)`` of mean σ(x_i) CE_i(W) + 0.02 ‖W‖², noisy images."""

    def __init__(self, w: Tensor, sample_logits: Tensor, data: Digits) -> None:
        self.w, self.sample_logits, self.data = w, sample_logits, data
        super().__init__([("w", w)], optimizer=torch.optim.SGD([w], lr=1.5))

    def loss(self, batch: None) -> Tensor:
        """Mean σ(x_i) CE_i + 0.02 ‖W‖²."""
        each = cross_entropy(self.data.x @ self.w, self.data.y, reduction="none")
        return (self.sample_logits.sigmoid() * each).mean() + 0.02 * self.w.square().sum()


class CleanImages(Problem):
    """Upper level: min over the logits x ``(n_train,)`` of mean CE(W) on clean images."""

    def __init__(self, sample_logits: Tensor, w: Tensor, data: Digits) -> None:
        self.w, self.data = w, data
        optimizer = torch.optim.Adam([sample_logits], lr=0.1)
        super().__init__([("sample_logits", sample_logits)], optimizer=optimizer)

    def loss(self, batch: None) -> Tensor:
        """Mean CE(W) on the clean images."""
        return cross_entropy(self.data.x_val @ self.w, self.data.y_val)

    @torch.no_grad()
    def test_accuracy(self) -> float:
        """The fraction of test images that W classifies correctly."""
        predicted = (self.data.x_test @ self.w).argmax(1)
        return float((predicted == self.data.y_test).double().mean())


def digits() -> tuple[CleanImages, WeightedImages]:
    """The two levels on scikit-learn's digits in float64: 800 noisy, 400 clean, 597 test images.

    About half of the training labels are redrawn at random. W = 0 and x = 0.

    Example:
        >>> upper, lower = digits()
        >>> upper.variables[0].shape, lower.variables[0].shape
        (torch.Size([800]), torch.Size([64, 10]))
    """
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=597, random_state=0)
    x, x_val, y, y_val = train_test_split(x, y, test_size=400, random_state=0)
    random = np.random.RandomState(0)
    redrawn = random.rand(len(y)) < 0.5
    y[redrawn] = random.randint(0, 10, redrawn.sum())
    x, x_val, x_test = (torch.from_numpy(a) for a in (x, x_val, x_test))
    x_test, (x, x_val) = standardised(x, x_test)[1], standardised(x, x_val)
    y, y_val, y_test = (torch.from_numpy(a) for a in (y, y_val, y_test))
    data = Digits(x, y, x_val, y_val, x_test, y_test, torch.from_numpy(redrawn))
    w = torch.zeros(x.shape[1], 10, dtype=x.dtype, requires_grad=True)
    logits = torch.zeros(len(x), dtype=x.dtype, requires_grad=True)
    return CleanImages(logits, w, data), WeightedImages(w, logits, data)
