"""Random states that are captured, replayed and seeded."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

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
    torch.save(dict(RandomState.capture().states), tmp_path / "state.pt")
    expected = draw()
    np.random.seed(0)
    RandomState(torch.load(tmp_path / "state.pt", weights_only=True)).restore()
    assert draw() == expected


def test_another_kind_of_generator_of_numpy_is_replayed_too() -> None:
    try:
        np.random.set_bit_generator(np.random.PCG64(0))
        for state in (RandomState.capture(), RandomState.seeded(CPU, 1)):
            state.restore()
            expected = draw()
            with replay(state):
                assert draw() == expected
    finally:
        np.random.set_bit_generator(np.random.MT19937(0))
