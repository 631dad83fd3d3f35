"""States of random number generators: capture, derivation from a seed, and replay."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hyperopt_peft.errors import ProblemError


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
        memory = _twister().memory.raw
        numpy = {**np.random.get_state(legacy=False), "state": memory}
        states = {"cpu": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
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
        _SEEDED.seed(seed % 2**32)
        numpy = {"bit_generator": "MT19937", "state": _OF_SEEDED.memory.raw}
        return cls({**states, "python": generator.getstate(), "numpy": numpy})

    def restore(self) -> None:
        """Set the generators to these states."""
        for name, state in self.states.items():
            if name == "cpu":
                torch.set_rng_state(state)
            elif name == "python":
                random.setstate(state)
            elif name == "numpy":
                _twister()
                np.random.set_state(state)
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


class MT19937(np.random.MT19937):
    """NumPy's usual generator; a replay reads and writes its state in 1 µs each, not 60."""

    @property
    def memory(self) -> Any:
        """NumPy's memory with the 624 words of the state and the position of the next word."""
        return (ctypes.c_char * 2500).from_address(self.ctypes.state_address)

    @property
    def state(self) -> Any:
        """The state as NumPy returns it; it can be set to ``memory.raw`` too."""
        words = np.frombuffer(self.memory.raw, np.uint32).copy()
        return {"bit_generator": "MT19937", "state": {"key": words[:-1], "pos": int(words[-1])}}

    @state.setter
    def state(self, value: Any) -> None:
        if isinstance(value, dict) and isinstance(value["state"], bytes):
            self.memory.raw = value["state"]
        else:
            np.random.MT19937.state.__set__(self, value)  # type: ignore[attr-defined]


_OF_SEEDED = MT19937(0)
_SEEDED = np.random.RandomState(_OF_SEEDED)


def _twister() -> MT19937:
    """NumPy's global generator, converted to this class if it is a plain MT19937."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is np.random.MT19937:
        state, generator = np.random.get_state(legacy=False), MT19937(0)
        np.random.set_bit_generator(generator)  # type: ignore[attr-defined]
        np.random.set_state(state)
    if not isinstance(generator, MT19937):
        raise ProblemError(
            f"np.random: {type(generator).__name__} cannot be replayed; set an MT19937 instead"
        )
    return generator
