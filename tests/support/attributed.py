"""A small network trained with a weight for each row, and its attribution."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from hyperopt_peft import Problem, attribute
from hyperopt_peft.attribution import Attribution
from hyperopt_peft.attribution.scores import Trained
from tests.support.trainers import values

ROWS, STEPS = 12, 30
Levels = tuple[Problem, Tensor, Callable[[], Tensor]]


class RowWeighted(Problem):
    """1/B Σ v_i ℓ_i over a batch of row numbers, by a network or, as ``named``, a part of it."""

    def __init__(self, net: nn.Module, weights: Tensor, named: Any = None, **options: Any) -> None:
        source = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 3, generator=source, dtype=torch.float64)
        self.y = torch.randint(0, 2, (ROWS,), generator=source).double()
        self.net, self.weights = net, weights
        super().__init__(named or net.named_parameters(), **options)

    def loss(self, rows: Tensor) -> Tensor:
        logits = self.net(self.x[rows]).squeeze(-1)
        each = binary_cross_entropy_with_logits(logits, self.y[rows], reduction="none")
        return (self.weights[rows] * each).mean()


def network(dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()


def ones() -> Tensor:
    return torch.ones(ROWS, dtype=torch.float64, requires_grad=True)


def levels(
    optimizer: Any = torch.optim.AdamW,
    *,
    clip: float | None = None,
    scheduled: bool = False,
    rows: int = ROWS,
    **options: Any,
) -> Levels:
    net, weights = network(), ones()
    steps = optimizer(net.parameters(), **(options or {"lr": 1e-2}))
    schedule = torch.optim.lr_scheduler.ExponentialLR(steps, 0.95) if scheduled else None
    batches = [torch.arange(k, min(k + 5, rows)) for k in range(0, rows, 5)]
    lower = RowWeighted(
        net, weights, data=batches, optimizer=steps, scheduler=schedule, max_grad_norm=clip
    )
    x = torch.randn(6, 3, dtype=torch.float64)

    def evaluation() -> Tensor:
        return (net[3](net[1](net[0](x))) - 1).square().mean()

    return lower, weights, evaluation


def scored(problem: Levels | None = None, **options: Any) -> Attribution:
    """The whole run of ``problem``, by default of `levels`."""
    lower, weights, evaluation = problem or levels()
    options = {"training_steps": STEPS, "progress": False, **options}
    return attribute(lower, weights, evaluation, **options)


def attributed(trainer: Any, **options: Any) -> Attribution:
    return attribute(trainer, progress=False, **options)


def setup_of(result: Attribution) -> Trained:
    setup: Trained = result.trained
    return setup


def differences(result: Attribution, epsilon: float = 1e-5) -> Tensor:
    """dΦ/dv by retraining with each row's weight moved up and down."""
    setup, slopes = setup_of(result), []
    for row in range(len(result.scores)):
        values = []
        for side in (epsilon, -epsilon):
            weights = setup.run.row_weights.clone()
            weights[row] += side
            with setup.run.repeated(weights):
                values.append(setup.evaluation.value())
        slopes.append((values[0] - values[1]) / (2 * epsilon))
    return torch.tensor(slopes, dtype=torch.float64)


def error(scores: Tensor, truth: Tensor) -> float:
    return float((scores - truth).norm() / truth.norm())


def error_of_slopes(result: Attribution, epsilon: float = 1e-5) -> float:
    """The relative error of the scores against `differences`."""
    return error(result.scores, differences(result, epsilon))


def require_equal(model: nn.Module, other: nn.Module, rounding: float) -> None:
    """The trained values of two models are equal, up to rounding."""
    expected = values(other)
    for name, value in values(model).items():
        truth = expected[name]
        assert float((value - truth).norm()) <= rounding * float(truth.norm()), name
