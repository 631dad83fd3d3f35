"""The key of a stored run: what changes it, and what does not."""

from __future__ import annotations

import copy
import datetime
import functools
import json
import re
from collections import OrderedDict, deque
from collections.abc import Callable
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, TaskType
from torch import nn
from transformers import DataCollatorWithPadding, EarlyStoppingCallback

from hyperopt_peft import BilevelTrainer
from hyperopt_peft.comparison.task import Task
from hyperopt_peft.trainer import code
from hyperopt_peft.trainer.contents import contents_of
from tests.support.comparisons import compared
from tests.support.files import tokenizer
from tests.support.identities import (
    Both,
    Collator,
    Letters,
    Object,
    Slots,
    Stops,
    closure,
    cyclic,
    dropout,
    frame,
    hook,
    key_of,
    model_with,
    reading,
    seeded,
    speaking,
    tensor,
    trainer_of,
    typed,
    used,
    values,
    weighted,
    within,
    words,
    zero,
)
from tests.support.process import python

#: By name, a function of 0 or 1 that makes what is a method's option.
OPTIONS: dict[str, Callable[[int], Any]] = {
    "number": lambda n: 1.0 + n,
    "array": values,
    "array of float32": lambda n: values(0).astype(["f8", "f4"][n]),
    "array of objects": lambda n: np.array([{"a": 1}, "b", n], dtype=object),
    "shape": lambda n: np.zeros([(2, 3), (3, 2)][n]),
    "scalar": lambda n: np.float32(0.1 + n),
    "tensor": tensor,
    "bfloat16": lambda n: tensor(1000 * n, torch.bfloat16),
    "parameter": lambda n: nn.Parameter(tensor(n)),
    "requires_grad": lambda n: torch.ones(2, requires_grad=bool(n)),
    "nested tensors": lambda n: [[tensor(0)], [tensor(n)]],
    "arrays by name": lambda n: {"a": values(0), 3: (values(n),)},
    "types": lambda n: ["1", 1][n],
    "frame": frame,
    "cell of a frame": lambda n: words("bc"[n]),
    "categories": lambda n: pandas.Categorical(["a"], categories=["a", "bc"[n]]),
    "series": lambda n: frame(n)["x"],
    "index": lambda n: pandas.Index([1, 2, 3 + n], name="k"),
    "name of an index": lambda n: pandas.Index([1, 2], name="kl"[n]),
    "rows": lambda n: Dataset.from_dict({"x": values(n)}),
    "object": lambda n: Object(values(n)),
    "slots": lambda n: Slots(tensor(n)),
    "slots of a base": lambda n: Both(tensor(n)),
    "cycle": lambda n: cyclic(values(n)),
    "dataclass": lambda n: Collator(tensor(n)),
    "enum": lambda n: [*Letters][n],
    "set": lambda n: {"a", "b", "cd"[n]},
    "path": lambda n: Path("ab"[n]),
    "dtype": lambda n: [torch.float32, torch.float64][n],
    "bytes": lambda n: b"ab"[n:],
    "pattern": lambda n: re.compile("ab"[n]),
    "date": lambda n: datetime.date(2026, 1, 1 + n),
    "attribute of a date": weighted,
    "decimal": lambda n: Decimal("0.1") + n,
    "order of an ordered dict": lambda n: OrderedDict([("a", 1), ("b", 2)][:: 1 - 2 * n]),
    "deque": lambda n: deque([1, 2 + n]),
    "generator of numpy": np.random.default_rng,
    "generator": seeded,
    "module": lambda n: zero(dropout(0.1)).double().requires_grad_(bool(n)),
    "weight": lambda n: nn.Embedding.from_pretrained(tensor(n)[:, None]),
    "dropout of a module": lambda n: zero(dropout(0.1 + n / 10)),
    "order of modules": lambda n: nn.Sequential(
        OrderedDict([("a", nn.Tanh()), ("b", nn.Tanh())][:: 1 - 2 * n])
    ),
    "class": lambda n: typed([2, 3][n]),
    "class of no module": lambda n: typed([2, 3][n], "none"),
    "object of a class": lambda n: typed([2, 3][n])(),
}
#: The same of an option of `compare_methods`, a function or an object.
FUNCTIONS: dict[str, Callable[[int], Any]] = {
    "closure": lambda n: closure(tensor(n)),
    "default": lambda n: within(tensor(n)),
    "default of a keyword": lambda n: within(1, keyword=tensor(n)),
    "code": lambda n: [lambda x: x * 2, lambda x: x * 3][n],
    "partial": lambda n: functools.partial(json.dumps, default=values(n)),
    "positional partial": lambda n: functools.partial(closure(1), tensor(n)),
    "callable object": lambda n: Object(tensor(n)),
    "bound method": lambda n: Object(tensor(n)).method,
    "global": lambda n: reading(tensor(n)),
    "code of a helper": lambda n: reading(1, ["1", "2"][n]),
    "decorated": lambda n: torch.no_grad()(closure(tensor(n))),
    "cached": lambda n: functools.cache(closure(tensor(n))),
    "attribute": lambda n: functools.wraps(values, updated=())(Object(tensor(n))),
}
#: The same of whole arguments.
ARGUMENTS: dict[str, Callable[[int], Any]] = {
    "attribute of a callback": lambda n: {"callbacks": [EarlyStoppingCallback(1 + n)]},
    "user's callback": lambda n: {"callbacks": [Stops(3 + n)]},
    "collator": lambda n: {"data_collator": DataCollatorWithPadding(tokenizer(), "x", [8, 9][n])},
    "trainer": lambda n: {"trainer": trainer_of(n)},
    "code of a trainer": lambda n: {"trainer": typed(2 + n, base=BilevelTrainer)},
    "base of a trainer": lambda n: {"trainer": typed(2, base=typed(2 + n, base=BilevelTrainer))},
    "tokenizer": lambda n: {"processing_class": speaking(["left", "right"][n])},
    "adapter": lambda n: {"adapter": LoraConfig(r=2 + n, target_modules=["query", "key", "value"])},
    "hook": lambda n: model_with(lambda m: m.bert.register_forward_hook(hook(tensor(n)))),
    "code of a hook": lambda n: model_with(
        lambda m: m.bert.register_forward_pre_hook([hook(1), lambda *_: None][n])
    ),
    "backward hook": lambda n: model_with(
        lambda m: m.bert.register_full_backward_hook(hook(tensor(n)))
    ),
    "buffer": lambda n: model_with(lambda m: m.register_buffer("mask", tensor(n))),
    "buffer that is not saved": lambda n: model_with(
        lambda m: m.register_buffer("mask", tensor(n), persistent=False)
    ),
    "dropout": lambda n: model_with(lambda m: setattr(m.dropout, "p", 0.2 + n / 10)),
    "training": lambda n: model_with(lambda m: m.bert.train(bool(n))),
    "attribute of a model": lambda n: model_with(lambda m: setattr(m, "scale", 1.0 + n)),
    "frozen": lambda n: model_with(lambda m: m.bert.requires_grad_(bool(n))),
    "bias": lambda n: model_with(lambda m: nn.init.constant_(m.classifier.bias, n)),
}


CASES: dict[str, Callable[[int], Any]] = {
    **{name: lambda n, x=each: {"option": x(n)} for name, each in OPTIONS.items()},
    **{name: lambda n, x=each: {"compute_loss_func": x(n)} for name, each in FUNCTIONS.items()},
    **ARGUMENTS,
}


@pytest.mark.parametrize("name", CASES)
def test_a_change_changes_the_key_and_an_equal_copy_does_not(name: str) -> None:
    make = CASES[name]
    assert key_of(**make(0)) == key_of(**make(0)) != key_of(**make(1))


def test_keys_are_the_same_in_another_process() -> None:
    """Whatever the order of sets."""
    program = f"import {__name__} as x; print([x.key_of(**each(0)) for each in x.CASES.values()])"
    other = python("-c", program, PYTHONHASHSEED="1").stdout.splitlines()[-1]
    assert other == str([key_of(**each(0)) for each in CASES.values()])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"option": {"a": 1, "b": 2}}, {"option": {"b": 2, "a": 1}}),
        ({"option": {*map(str, range(99))}}, {"option": {*map(str, reversed(range(99)))}}),
        ({"option": [once := tensor(0), once]}, {"option": [tensor(0), tensor(0)]}),
        ({"option": tensor(0)[::2]}, {"option": tensor(0)[::2].clone()}),
        (
            {"adapter": LoraConfig(task_type="SEQ_CLS")},
            {"adapter": LoraConfig(task_type=TaskType.SEQ_CLS)},
        ),
        ({"processing_class": tokenizer()}, {"processing_class": used()}),
        (
            {},
            model_with(lambda m: [m.register_forward_hook(hook(1)).remove() for _ in range(3)]),
        ),
    ],
)
def test_what_changes_no_run_changes_no_key(one: Any, other: Any) -> None:
    assert key_of(**one) == key_of(**other)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
NESTED = st.recursive(
    PLAIN | st.binary() | st.lists(st.floats(width=32), min_size=1).map(torch.tensor),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each) | each.map(Object),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(NESTED, min_size=1), st.data())
def test_contents_are_those_of_a_copy_and_not_of_a_change(values: list[Any], data: Any) -> None:
    before = contents_of(values)
    assert contents_of(copy.deepcopy(values)) == before == json.loads(json.dumps(before))
    place = data.draw(st.integers(0, len(values) - 1))
    values[place] = Slots(values[place])
    assert contents_of(values) != before


def test_a_call_with_the_same_objects_makes_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although a training changes a callback, a collator and a tokenizer."""
    options = {"callbacks": [Stops(99)], "data_collator": DataCollatorWithPadding(tokenizer())}
    before = compared(folder=tmp_path, **options)
    monkeypatch.setattr(Task, "run", lambda *_: pytest.fail("a run"))
    after = compared(folder=tmp_path, **options)
    assert str(before) == str(after) and not after.store.remark()


def test_another_version_of_a_plug_in_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(pandas.Timestamp(0)), key_of()
    monkeypatch.setattr(code, "version", lambda name: "0.1" if name == "pandas" else version(name))
    assert key_of(pandas.Timestamp(0)) != before[0] and key_of() == before[1]
