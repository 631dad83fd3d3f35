"""Random states that are captured, replayed and seeded."""

import random

import numpy as np
import pytest
import torch

from hyperopt_peft.utils.random_state import (
    RandomState,
    host_random_state,
    replay,
    restore_host_random_state,
)

CPU = [torch.device("cpu")]


def test_replay_repeats_the_numbers_and_leaves_the_stream_as_it_was() -> None:
    state = RandomState.capture(CPU)
    first = torch.rand(3)
    outside = torch.get_rng_state()
    with replay(state):
        assert torch.equal(torch.rand(3), first)
    with pytest.raises(KeyError), replay(state):
        raise KeyError(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), outside)


def test_seeded_states_are_functions_of_the_whole_key() -> None:
    """Neighbouring steps and seeds may not share their masks."""
    keys = [
        (0, 1),
        (1, 0),
        (0, 11),
        (1, 1),
        (0, "1", "upper"),
        (0, 1, "lower"),
        (12,),
        (0, 1, 1),
        (11,),
    ]
    draws = []
    for key in keys:
        with replay(RandomState.seeded(CPU, *key)):
            draws.append(torch.rand(4))
        with replay(RandomState.seeded(CPU, *key)):
            assert torch.equal(torch.rand(4), draws[-1])
    distinct = {tuple(draw.tolist()) for draw in draws}
    assert len(distinct) == len(keys)


def test_the_states_of_python_and_numpy_come_back() -> None:
    """A data set may draw from them: they belong to a resumed run."""
    np.random.normal()  # leaves a second normal number cached
    state = host_random_state()
    drawn = random.random(), np.random.normal(), np.random.randint(10**6)
    restore_host_random_state(state)
    assert (random.random(), np.random.normal(), np.random.randint(10**6)) == drawn
