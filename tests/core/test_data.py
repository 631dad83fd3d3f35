"""The endless stream of batches, and its return to any position."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hyperopt_peft.core.data import DataStream
from tests.support.networks import differences

N = 7


class Noisy(Dataset[Tensor]):
    """Items with noise of their own, drawn when they are fetched."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(()) + random.random() + np.random.normal()


class Streamed(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N).tolist())


def own() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def batched(sampler: Any) -> DataLoader[int]:
    return DataLoader(list(range(N)), batch_sampler=BatchSampler(sampler, 2, False))


LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: list(range(N)),
    "shuffled": lambda: DataLoader(list(range(N)), batch_size=2, shuffle=True),
    "own generator": lambda: DataLoader(
        list(range(N)), batch_size=2, shuffle=True, generator=own()
    ),
    "sampler's generator": lambda: DataLoader(
        list(range(N)), 2, sampler=RandomSampler(range(N), generator=own())
    ),
    "batch sampler's generator": lambda: batched(RandomSampler(range(N), generator=own())),
    "weighted": lambda: DataLoader(
        list(range(N)), 2, sampler=WeightedRandomSampler([1.0] * N, N, generator=own())
    ),
    "subset": lambda: batched(SubsetRandomSampler(range(1, N))),
    "noisy items": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True),
    "streamed": lambda: DataLoader(Streamed(), batch_size=2),
}


def draw(batches: DataStream, count: int) -> list[Any]:
    return [batches.next() for _ in range(count)]


@pytest.mark.parametrize("kind", LOADERS)
@given(before=st.integers(0, 11), other=st.integers(0, 9), peek=st.booleans(), reused=st.booleans())
def test_a_state_is_a_place(kind: str, before: int, other: int, peek: bool, reused: bool) -> None:
    """In a new stream, and in the old one after ``other`` further batches."""
    torch.manual_seed(1)
    batches = DataStream(LOADERS[kind](), "fit")
    draw(batches, before)
    if peek:
        batches.peek()
    state, random = batches.state_dict(), torch.get_rng_state()
    expected = draw(batches, 9)
    draw(batches, other)

    torch.manual_seed(2)
    resumed = batches if reused else DataStream(LOADERS[kind](), "fit")
    outside = torch.get_rng_state()
    resumed.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), outside)
    torch.set_rng_state(random)
    assert not differences(draw(resumed, 9), expected)


@pytest.mark.parametrize("kind", ["shuffled", "own generator", "weighted"])
def test_every_epoch_has_an_order_of_its_own(kind: str) -> None:
    batches = DataStream(LOADERS[kind](), "fit")
    epochs = [torch.cat(draw(batches, 4)).tolist() for _ in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
