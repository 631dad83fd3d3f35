"""States of random number generators: capture, derivation from a seed, and replay."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """The states of the global generators of PyTorch, Python and NumPy.

    Two evaluations from one state have equal dropout masks. ``states`` maps ``"python"``,
    ``"numpy"`` and devices (``"cpu"``, ``"cuda:0"``) to states that
    ``torch.load(..., weights_only=True)`` can read.
    """

    states: Mapping[str, Any]

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = ()) -> RandomState:
        """The current states of the generators of Python, NumPy, the CPU and ``devices``."""
        numpy: Any = np.random.get_state(legacy=False)
        states = {"cpu": torch.get_rng_state(), "python": random.getstate()}
        states["numpy"] = _packed(numpy)
        for device in devices:
            if device.type != "cpu":
                states[str(device)] = torch.get_device_module(device).get_rng_state(device)
        return cls(states)

    @classmethod
    def seeded(cls, devices: Iterable[torch.device], *key: int | str) -> RandomState:
        """The state that ``key`` determines, for example ``(seed, step, "upper")``."""
        generator = random.Random(":".join(map(str, key)))
        seed = generator.getrandbits(63)
        names = {"cpu", *(str(device) for device in devices)}
        states = {name: torch.Generator(name).manual_seed(seed).get_state() for name in names}
        kind: Any = type(np.random.get_bit_generator())  # type: ignore[attr-defined]
        numpy = np.random.RandomState(kind(seed)).get_state(legacy=False)
        return cls({**states, "python": generator.getstate(), "numpy": _packed(numpy)})

    def restore(self) -> None:
        """Set the generators to these states."""
        for name, state in self.states.items():
            if name == "cpu":
                torch.set_rng_state(state)
            elif name == "python":
                random.setstate(state)
            elif name == "numpy":
                np.random.set_state(_unpacked(state))
            else:
                torch.get_device_module(torch.device(name)).set_rng_state(state, name)


@contextmanager
def replay(state: RandomState) -> Iterator[None]:
    """Run the body from ``state``; restore the current state afterwards."""
    devices = state.states.keys() - {"python", "numpy"}
    outside = RandomState.capture(map(torch.device, devices))
    state.restore()
    try:
        yield
    finally:
        outside.restore()


def _packed(state: dict[str, Any]) -> dict[str, Any]:
    """A state of NumPy with bytes in place of arrays."""
    arrays = state["state"].items()
    inner = {key: x.tobytes() if isinstance(x, np.ndarray) else x for key, x in arrays}
    return {**state, "state": inner}


def _unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_packed`."""
    packed = state["state"].items()
    inner = {key: np.frombuffer(x, np.uint32) if isinstance(x, bytes) else x for key, x in packed}
    return {**state, "state": inner}
