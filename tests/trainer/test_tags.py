"""Tags: numbers beside their rows, whatever the collator does, or one clear line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)

from hyperopt_peft import ProblemError
from hyperopt_peft.trainer.tags import InOrder, TagCollator
from tests.support import language

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
MESSAGE = "data_collator: returns its rows in another order"


def tokenizer(side: str = "right") -> Any:
    made = deepcopy(language.tokenizer())
    made.padding_side, made.mask_token = side, "a"
    return made


RIGHT, LEFT = tokenizer(), tokenizer("left")


def rows_of(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of these lengths with some tokens of the alphabet."""
    ids = [[5 + (3 * row + k) % 7 for k in range(n)] for row, n in enumerate(lengths)]
    return [{"input_ids": x, "attention_mask": [1] * len(x)} for x in ids]


def padded(rows: Any) -> Any:
    return default_data_collator([{k: (v + [0] * 9)[:9] for k, v in row.items()} for row in rows])


def appends(rows: Any) -> Any:
    """Changes its rows, which it may do once."""
    for row in rows:
        row["input_ids"].append(3)
        row["attention_mask"].append(1)
    return DataCollatorWithPadding(RIGHT)(rows)


def numbered(rows: Any) -> Any:
    """With the place of each row in the batch, as contrastive losses need it."""
    return {**DataCollatorWithPadding(RIGHT)(rows), "place": torch.arange(len(rows))}


COLLATORS: dict[str, Callable[[Any], Any]] = {
    "right": DataCollatorWithPadding(RIGHT),
    "left": DataCollatorWithPadding(LEFT),
    "masks": DataCollatorForLanguageModeling(RIGHT, mlm=True, mlm_probability=0.2),
    "masks of its own": DataCollatorForLanguageModeling(
        RIGHT, mlm=True, mlm_probability=0.2, seed=1
    ),
    "one row": DataCollatorWithFlattening(),
    "padded": padded,
    "changes its rows": appends,
    "places": numbered,
}


@pytest.mark.parametrize("name", COLLATORS)
@given(batches=st.lists(LENGTHS, min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_a_collator_that_keeps_the_order_makes_its_batches(name: str, batches: Any) -> None:
    """Equal rows, single rows and random masks included; no random number is drawn."""
    collate = COLLATORS[name]
    checked = InOrder(collate)
    for lengths in batches:
        rows = rows_of(lengths + lengths[:2])
        torch.manual_seed(0)
        expected = None if name == "masks of its own" else collate(deepcopy(rows))
        torch.manual_seed(0)
        made = checked(rows)
        for key in expected or ():
            assert torch.equal(torch.as_tensor(made[key]), torch.as_tensor(expected[key]))


ORDERS: dict[str, Callable[[Any], Any]] = {
    "longest first": lambda rows: sorted(rows, key=lambda row: -sum(row["attention_mask"])),
    "last first": lambda rows: rows[::-1],
}


@pytest.mark.parametrize(
    ("name", "order"),
    [*product(["right", "left", "padded"], ORDERS), ("masks", "longest first")],
)
@given(lengths=st.lists(st.integers(1, 9), min_size=4, max_size=8, unique=True))
@settings(max_examples=10, deadline=None)
def test_another_order_is_refused(name: str, order: str, lengths: Any) -> None:
    """At the first batch in which it can be: rows of one length show no order."""
    checked = InOrder(lambda rows: COLLATORS[name](ORDERS[order](rows)))
    if order == "longest first":
        checked(rows_of([5] * 4))
    checked(rows_of([3]))
    with pytest.raises(ProblemError, match=MESSAGE):
        checked(rows_of(lengths))


def test_each_column_of_different_lengths_is_tried() -> None:
    """Here by its targets, where the inputs are equally long; and not again once it was tried."""
    calls = []

    def collate(rows: Any) -> Any:
        calls.append(len(rows))
        rows = sorted(rows, key=lambda row: -len(row["target"]))
        return {"sum": torch.tensor([sum(row["input_ids"]) for row in rows])}

    checked = InOrder(collate, batches=0)
    for _ in range(2):
        checked([{"input_ids": [1] * (k + 1), "target": [0]} for k in range(3)])
    assert calls == [3] * 4
    with pytest.raises(ProblemError, match=MESSAGE):
        checked([{"input_ids": [k], "target": [0] * (k + 1)} for k in range(3)])


def images(rows: Any) -> Any:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


SORTS: dict[str, Callable[[Any], Any]] = {
    "by label": lambda rows: sorted(rows, key=lambda row: row["labels"]),
    "by a value": lambda rows: sorted(rows, key=lambda row: row["pixels"][1]),
    "at random": lambda rows: [rows[k] for k in torch.randperm(len(rows))],
}


@pytest.mark.parametrize("order", SORTS)
@given(seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_another_order_of_rows_of_one_size_is_refused(order: str, seed: int) -> None:
    """Of images or windows; also where the first batches have one class."""
    pixels = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [{"pixels": x, "labels": k % 2} for k, x in enumerate(pixels)]
    torch.manual_seed(seed)
    assert InOrder(images)(rows)["labels"].tolist() == [0, 1] * 4
    checked = InOrder(lambda rows: images(SORTS[order](rows)))
    if order == "by label":
        checked(rows[::2])
    with pytest.raises(ProblemError, match=MESSAGE):
        checked(rows)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_number_of_each_token_is_beside_its_token_or_refused(side: str) -> None:
    pad = DataCollatorForTokenClassification(tokenizer(side))
    rows = [{"input_ids": [5] * n, "labels": [1] * n, "k": [*range(n)]} for n in (3, 1)]
    collate = TagCollator(pad, ["k"])
    if side == "right":
        assert collate(rows)["k"].tolist() == [[0, 1, 2], [0, 0, 0]]
        return
    with pytest.raises(ProblemError, match=r"column 'k': .* on the left"):
        collate(rows)
    assert collate(rows[:1])["k"].tolist() == [[0, 1, 2]]


def test_whole_numbers_are_exact() -> None:
    rows = [{"labels": 0, "k": 2**40 + 1, "x": 0.1}]
    batch = TagCollator(default_data_collator, ["k", "x"])(rows)
    assert batch["k"].item() == 2**40 + 1 and batch["x"].dtype == torch.float32
