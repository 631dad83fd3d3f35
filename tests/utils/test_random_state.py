"""Random states that are captured, replayed and seeded."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperopt_peft import ProblemError
from hyperopt_peft.utils.random_state import RandomState, replay

CPU = [torch.device("cpu")]


def draw() -> list[float]:
    """Numbers of each global generator; an odd count of normal ones leaves a second cached."""
    host = [random.random(), random.gauss(), np.random.rand(), np.random.normal()]
    return [*host, float(np.random.randint(10**6)), *torch.rand(2).tolist()]


@pytest.fixture(params=["fresh", "cached"], autouse=True)
def generators(request: pytest.FixtureRequest) -> None:
    """As after `numpy.random.seed`, and with a normal number in each cache."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    if request.param == "cached":
        random.gauss()
        np.random.normal()


def test_replay_repeats_the_numbers_and_leaves_the_streams_as_they_were() -> None:
    state = RandomState.capture(CPU)
    first, second = draw(), draw()
    state.restore()
    draw()
    with replay(state):
        assert draw() == first
    with pytest.raises(KeyError), replay(state):
        raise KeyError(draw())
    assert draw() == second


def test_seeded_states_are_functions_of_the_whole_key() -> None:
    """Neighbouring steps and seeds may not share their masks, in any generator."""
    keys = [(0, 1), (1, 0), (0, 11), (0, "1", "upper"), (0, 1, "lower"), (0, 1, 1), (11,)]
    draws = []
    for key in keys:
        with replay(RandomState.seeded(CPU, *key)):
            draws.append(draw())
        np.random.normal()
        with replay(RandomState.seeded(CPU, *key)):
            assert draw() == draws[-1]
    for numbers in zip(*draws, strict=True):
        assert len(set(numbers)) == len(keys)


def test_a_state_is_read_from_a_file_by_another_process(tmp_path: Path) -> None:
    """Where NumPy's generator is still its own."""
    torch.save(dict(RandomState.capture().states), tmp_path / "state.pt")
    expected = draw()
    np.random.set_bit_generator(np.random.MT19937(0))
    RandomState(torch.load(tmp_path / "state.pt", weights_only=True)).restore()
    assert draw() == expected


def test_numpys_functions_are_as_they_were_after_a_capture() -> None:
    """Seeds, states and numbers are those of a generator that nobody has touched."""
    alone = np.random.RandomState(5)
    np.random.seed(5)
    RandomState.capture()
    kept = np.random.get_state()
    for _ in range(2):
        assert np.random.normal(size=1001).tolist() == alone.normal(size=1001).tolist()
        for one, other in zip(np.random.get_state(), alone.get_state(), strict=True):
            assert np.array_equal(one, other)
        np.random.set_state(kept)
        alone.set_state(kept)
    words = [int(word) for word in kept[1]]
    np.random.set_state((kept[0], words, *kept[2:]))
    assert np.array_equal(np.random.get_state()[1], kept[1])


def test_another_kind_of_generator_is_refused() -> None:
    try:
        np.random.set_bit_generator(np.random.PCG64(0))
        with pytest.raises(ProblemError, match="PCG64"):
            RandomState.capture()
    finally:
        np.random.set_bit_generator(np.random.MT19937(0))
