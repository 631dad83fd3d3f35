"""What the tests of bad input share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel
from torch import nn

from hyperopt_peft import BilevelTrainer
from hyperopt_peft.problems.bidora import Direction, Magnitude
from tests.support.trainers import arguments, data, values


def refuses(error: Any, message: str, model: nn.Module, act: Any) -> None:
    """``act`` raises ``error`` with ``message``, and ``model`` is what it was."""
    before = values(model)
    with pytest.raises(error, match=message):
        act()
    after = values(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def cases(table: Any) -> Any:
    """One test a kind, under its name."""
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


def rows(begin: Any, end: Any, **options: Any) -> Any:
    return data(rows=60, **options).select(range(begin, end))


def relabelled(names: Any, label: str = "labels") -> Any:
    """Rows with classes 0, 1, 2, ... of as many names, every one four times."""
    count = len(names)
    table = data(rows=4 * count).remove_columns("labels")
    table = table.add_column(label, [row % count for row in range(4 * count)])
    return table.cast_column(label, ClassLabel(names=names))


def stream() -> Any:
    return data().to_iterable_dataset()


APART = {"train_dataset": rows(0, 30), "upper_dataset": rows(30, 60)}


def levels(model: nn.Module, **options: Any) -> dict[str, Any]:
    return {"lower": Direction(model, **options), "upper": Magnitude(model)}


def plain(
    model: nn.Module, folder: Path, *, settings: Any = None, **options: Any
) -> BilevelTrainer:
    """A `BilevelTrainer` over the levels of BiDoRA."""
    args = arguments(folder, **(settings or {}))
    return BilevelTrainer(model, **{**levels(model), "args": args, **APART, **options})
