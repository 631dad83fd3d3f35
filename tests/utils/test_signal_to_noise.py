"""The ratio is that of its definition, whatever the order, and of a known distribution."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperopt_peft.utils.signal_to_noise import SignalToNoise


def ratio(vectors: Tensor) -> float | None:
    """That of the rows, given in two parts of different shapes."""
    signal = SignalToNoise()
    for row in vectors:
        signal.add([row[:2].reshape(1, 2), row[2:]])
    return signal.read()


def defined(vectors: Tensor) -> float:
    count, mean = len(vectors), vectors.mean(0)
    noise = float((vectors - mean).square().sum()) / (count - 1)
    return math.sqrt(max(0.0, float(mean.square().sum()) - noise / count) / noise)


@given(st.integers(2, 12), st.integers(3, 6), st.integers(0, 10**6), st.floats(0, 10))
def test_it_is_the_definition(count: int, size: int, seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, size, dtype=torch.float64, generator=generator) + shift
    assert ratio(vectors) == pytest.approx(defined(vectors), rel=1e-9, abs=1e-7)
    assert ratio(vectors.flip(0)) == pytest.approx(defined(vectors), rel=1e-9, abs=1e-7)


def test_equal_vectors_have_no_noise_and_zeros_no_ratio() -> None:
    assert ratio(torch.ones(3, 4)) == math.inf
    assert ratio(torch.zeros(3, 4)) is None
    assert ratio(torch.ones(1, 4)) is None and SignalToNoise().read() is None


def test_reading_begins_again() -> None:
    vectors = torch.randn(6, 4, dtype=torch.float64)
    signal = SignalToNoise()
    for part in vectors.split(3):
        for row in part:
            signal.add([row])
        assert signal.count == 3
        assert signal.read() == pytest.approx(defined(part), rel=1e-12)
    assert signal.count == 0 and signal.read() is None
