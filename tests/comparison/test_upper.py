"""What the upper level of a run did, and what it has where a method leaves it open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Method
from hyperopt_peft.comparison.upper import UpperLevel, arguments_of
from hyperopt_peft.problems import BiDoRA
from tests.support.comparisons import compared
from tests.support.trainers import QUIET

ROWS = Dataset.from_dict({"x": [[1.0]] * 8})


@dataclass
class Quadratic(Method):
    """f = ½·(w − Σu)² and F = ½·w² + 2·Σu, so that dF/du = 2 + w for each entry of u.

    The direct term is 2, and the implicit one w.
    """

    start: float = 3.0
    least: float = -10.0

    own_loss = True

    def prepare(self, model: Any) -> None:
        self.u = {n: torch.full(s, self.start).requires_grad_() for n, s in SHAPES.items()}

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        return self.u

    def total(self) -> Any:
        return sum(u.sum() for u in self.u.values())

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        return (model.weight.sum() - self.total()).square() / 2

    def upper_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        return model.weight.sum().square() / 2 + 2 * self.total()

    def after_upper_step(self) -> None:
        for u in self.u.values():
            u.clamp_(min=self.least)

    def after_search(self, model: Any) -> None:
        for u in self.u.values():
            u.zero_()


SHAPES = {"one": (), "several": (3,)}


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))

    def forward(self, x: Any) -> Any:
        return self.weight * x


def watched(folder: Path, method: Method, **options: Any) -> dict[str, Any]:
    """The entries after 12 lower steps that do not move w = 1, and four upper ones."""
    settings = {"max_steps": 12, "lower_steps": 3, "learning_rate": 0.0, "hypergradient": "cg"}
    settings |= {"upper_learning_rate": 0.25, "upper_max_grad_norm": 0.0, "optim": "sgd"}
    settings |= {"lr_scheduler_type": "constant", "remove_unused_columns": False, **QUIET}
    settings |= {"logging_strategy": "no", **options}
    args = BilevelTrainingArguments(str(folder), **settings)
    sets = {"train_dataset": ROWS, "upper_dataset": ROWS.map(lambda row: {"x": [2.0]})}
    trainer = BilevelTrainer(Weight(), args, method=method, **sets)
    level = UpperLevel(trainer)
    trainer.train()
    entries: dict[str, Any] = level.entries["upper"]
    return entries


@pytest.mark.parametrize("retrain", ["none", "warm", "scratch"])
def test_steps_distance_and_terms_of_a_search(tmp_path: Path, retrain: str) -> None:
    """Each of four steps moves every entry by .75; a second phase has no part in it."""
    found = watched(tmp_path, Quadratic(), retrain=retrain)
    expected = {"steps": 4, "start": 6.0, "moved": 1.0, "moved_in_rates": 12.0}
    expected |= {"implicit_ratio": 0.5, "residual": 0.0}
    assert found == {
        "lower_steps": 3,
        "hypergradient": "cg",
        **{name: pytest.approx(number, abs=1e-6) for name, number in expected.items()},
    }


def test_a_frozen_level_does_not_move(tmp_path: Path) -> None:
    found = watched(tmp_path, Quadratic(), upper_learning_rate=0.0)
    assert found["steps"] == 4 and found["moved"] == 0 and "moved_in_rates" not in found


def test_a_projection_is_part_of_a_step(tmp_path: Path) -> None:
    """And the distance from 0 is absolute: of four entries that stop at −1."""
    found = watched(tmp_path, Quadratic(start=0.0, least=-1.0), hypergradient="direct")
    assert (found["start"], found["moved"], found["moved_in_rates"]) == (0.0, 2.0, 4.0)
    assert found["implicit_ratio"] == 0 and "residual" not in found


def test_a_line_has_it(tmp_path: Path) -> None:
    found = compared({"m": BiDoRA()})
    pairs = found.plan.candidates()
    (method, *_), (frozen, *_), (together, *_) = (found.reported(*each) for each in pairs)
    assert method["upper"]["steps"] == frozen["upper"]["steps"] == sum(method["steps"][:1]) // 2
    assert 0 < method["upper"]["moved"] < 0.1 and frozen["upper"]["moved"] == 0
    assert "upper" not in together


class Given(Quadratic):
    defaults = MappingProxyType({"hypergradient": "cg"})


class Steps(Quadratic):
    defaults = MappingProxyType({"lower_steps": 2})


@pytest.mark.parametrize(
    ("method", "own", "expected"),
    [
        (Quadratic(), {}, (4, "darts")),
        (Quadratic(), {"lower_steps": 1, "hypergradient": "direct"}, (1, "direct")),
        (Steps(), {}, (2, "darts")),
        (Given(), {}, (1, "cg")),
        (Method(), {}, (1, "minres")),
    ],
)
def test_what_a_method_leaves_open(method: Any, own: Any, expected: Any) -> None:
    """Neither the user's arguments nor the method's defaults are replaced."""
    args = arguments_of(method, BilevelTrainingArguments("unused", report_to="none", **own))
    assert (args.lower_steps, args.hypergradient) == expected
