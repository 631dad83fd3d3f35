"""The state of the random number generators a loss draws from, captured and replayed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The generator state of the CPU and of every accelerator in use.

    Dropout masks are a function of it: two evaluations from one state see one mask.
    ``states`` maps a device (``"cpu"``, ``"cuda:0"``) to its generator's state.
    """

    states: Mapping[str, Tensor]

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = ()) -> RandomState:
        """The current state of the CPU's generator and of those of ``devices``."""
        states = {"cpu": torch.get_rng_state()}
        for device in devices:
            if device.type != "cpu":
                states[str(device)] = torch.get_device_module(device).get_rng_state(device)
        return cls(states)

    @classmethod
    def seeded(cls, devices: Iterable[torch.device], *key: int | str) -> RandomState:
        """A state of its own for every ``key``, for example ``(seed, step, "upper")``."""
        seed = random.Random(":".join(map(str, key))).getrandbits(63)
        names = {"cpu", *(str(device) for device in devices)}
        return cls({name: torch.Generator(name).manual_seed(seed).get_state() for name in names})

    def restore(self) -> None:
        """Make this the current state."""
        for name, state in self.states.items():
            if name == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(torch.device(name)).set_rng_state(state, name)


def host_random_state() -> dict[str, Any]:
    """The states of Python's and NumPy's own generators, which a data set may draw from.

    Plain values and a tensor, so that ``torch.load(..., weights_only=True)`` reads them.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    return {"python": random.getstate(), "numpy": (kind, words, *rest)}


def restore_host_random_state(state: Mapping[str, Any]) -> None:
    """Make ``state``, of `host_random_state`, the current one."""
    random.setstate(state["python"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))


@contextmanager
def replay(state: RandomState) -> Iterator[None]:
    """Run the body from ``state``; the state outside is the same before and after."""
    outside = RandomState.capture(torch.device(name) for name in state.states)
    state.restore()
    try:
        yield
    finally:
        outside.restore()
