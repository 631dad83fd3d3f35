"""Values that differ in one entry, and the key of the runs that depend on them."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from typing import Any

import numpy as np
import pandas
import torch
from torch import nn
from transformers import TrainerCallback

from hyperopt_peft import BilevelTrainer, Method
from hyperopt_peft.comparison.identity import settings_of
from hyperopt_peft.comparison.rows import Rows
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Task
from tests.support.comparisons import parts_of
from tests.support.files import tokenizer
from tests.support.trainers import data

make_model, ADAPTER, ARGS = parts_of("classes")
TRAIN, TEST = data("classes", 12), data("classes", 6, seed=5)


class Mine(Method):
    def __init__(self, option: Any = None) -> None:
        self.option = option


def key_of(
    option: Any = None,
    base_model: Any = make_model,
    adapter: Any = ADAPTER,
    trainer: Any = BilevelTrainer,
    **options: Any,
) -> str:
    methods, rows = {"mine": Mine(option)}, Rows(TRAIN, None, TEST)
    task = Task(methods, base_model, adapter, ARGS, rows, "loss", trainer, options)
    store = Store(None, settings_of(task))
    assert not store.remark()
    return store.key("mine", 0)


class Object:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *_: Any) -> Any:
        return self.value

    def method(self, *_: Any) -> Any:
        return self.value


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Both(Slots):  # slots and a __dict__
    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.other = 1


class Day(date):  # whose own __reduce__ knows no attribute
    def __init__(self, *_: int) -> None:
        self.weight = 0


class Letters(Enum):
    A = "a"
    B = "b"


@dataclass
class Collator:
    weights: Any
    names: set[str] = field(default_factory=lambda: {"a", "b", "c"})

    def __call__(self, rows: Any) -> Any:
        return rows


class Stops(TrainerCallback):
    def __init__(self, after: int) -> None:
        self.after, self.seen = after, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(state.global_step)


def speaking(side: str) -> Any:
    made = tokenizer()
    made.padding_side = side
    return made


def used() -> Any:
    made = tokenizer()
    made(["w1 w2", "w3"], padding=True, truncation=True, max_length=4)
    return made


def values(n: int) -> Any:
    """2,000 numbers, one of which is another in its fifth decimal."""
    return 1.0 + 1e-5 * n * (np.arange(2000) == 777)


def tensor(n: int, dtype: Any = torch.float64) -> Any:
    return torch.tensor(values(n)).to(dtype)


def frame(n: int) -> Any:
    columns = {"x": values(n), "y": ["a"] * 2000, "z": pandas.Categorical(["b", "c"] * 1000)}
    return pandas.DataFrame(columns)


def words(word: str) -> Any:
    return pandas.DataFrame({"word": ["a", word, None], "when": pandas.Timestamp("2026-01-01")})


def within(weights: Any, *, keyword: Any = None) -> Any:
    return lambda outputs, labels, weights=weights, *, k=keyword: (outputs, weights, k)


def closure(weights: Any) -> Any:
    def loss(outputs: Any, labels: Any) -> Any:
        return helper(outputs)

    def helper(outputs: Any) -> Any:
        return outputs, weights, loss  # a cycle

    return loss


def reading(weights: Any, text: str = "WEIGHTS") -> Any:
    """A function of a module, which a function of its reads, that reads a global."""
    module = types.ModuleType("users")
    vars(module).update(WEIGHTS=weights, OTHER=object)
    exec(f"def inner(x):\n    return [{text} for _ in x]", vars(module))
    exec("def loss(x):\n    return inner(x)", vars(module))
    return vars(module)["loss"]


def typed(factor: int, module: str = __name__, base: Any = object) -> Any:
    """A class that no file has, as one of a notebook."""
    text = f"class Typed(Base):\n    def double(self, x):\n        return {factor} * x"
    exec(text, names := {"__name__": module, "Base": base})
    return names["Typed"]


def trainer_of(n: int) -> Any:
    class Users(BilevelTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return n, super().compute_loss(*args, **kwargs)

    return Users


def model_with(change: Callable[[Any], Any]) -> Any:
    def made() -> Any:
        change(module := make_model())
        return module

    return {"base_model": made}


def hook(scale: Any) -> Any:
    return lambda module, args, output=None: (output or args)[0] * scale


def weighted(value: Any) -> Any:
    day = Day(2026, 1, 1)
    day.weight = value
    return day


def cyclic(value: Any) -> Any:
    one, other = Object(value), Object(None)
    one.other, other.value = other, [one]
    return one


def dropout(p: float) -> Any:
    return nn.Sequential(nn.Linear(2, 2, bias=False).requires_grad_(False), nn.Dropout(p))


def zero(module: Any) -> Any:
    nn.init.zeros_(module[0].weight)
    return module


def seeded(n: int) -> Any:
    return torch.Generator().manual_seed(n)
