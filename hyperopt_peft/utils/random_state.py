"""States of random number generators: captured, derived from a seed, and replayed."""

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
    """The states of PyTorch's generators on the CPU and on accelerators.

    Dropout masks are a function of the state: two evaluations from one state have equal masks.
    ``states`` maps a device (``"cpu"``, ``"cuda:0"``) to the state of the device's generator.

    Example:
        >>> state = RandomState.capture()
        >>> first = torch.rand(3)
        >>> state.restore()
        >>> torch.equal(torch.rand(3), first)
        True
    """

    states: Mapping[str, Tensor]

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = ()) -> RandomState:
        """The current states of the generators of the CPU and of ``devices``."""
        states = {"cpu": torch.get_rng_state()}
        for device in devices:
            if device.type != "cpu":
                states[str(device)] = torch.get_device_module(device).get_rng_state(device)
        return cls(states)

    @classmethod
    def seeded(cls, devices: Iterable[torch.device], *key: int | str) -> RandomState:
        """The state that is a function of ``key``, for example ``(seed, step, "upper")``."""
        seed = random.Random(":".join(map(str, key))).getrandbits(63)
        names = {"cpu", *(str(device) for device in devices)}
        return cls({name: torch.Generator(name).manual_seed(seed).get_state() for name in names})

    def restore(self) -> None:
        """Set the generators to these states."""
        for name, state in self.states.items():
            if name == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(torch.device(name)).set_rng_state(state, name)


def host_random_state() -> dict[str, Any]:
    """The states of the global generators of Python and NumPy, which a data set may use.

    The result has plain values and a tensor, which ``torch.load(..., weights_only=True)`` reads.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    return {"python": random.getstate(), "numpy": (kind, words, *rest)}


def restore_host_random_state(state: Mapping[str, Any]) -> None:
    """Set the global generators of Python and NumPy to ``state``, of `host_random_state`."""
    random.setstate(state["python"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))


@contextmanager
def replay(state: RandomState) -> Iterator[None]:
    """Run the body from ``state``; restore the current state afterwards.

    Example:
        >>> state = RandomState.seeded([], "upper", 1)
        >>> with replay(state):
        ...     first = torch.rand(3)
        >>> with replay(state):
        ...     torch.equal(torch.rand(3), first)
        True
    """
    outside = RandomState.capture(torch.device(name) for name in state.states)
    state.restore()
    try:
        yield
    finally:
        outside.restore()
