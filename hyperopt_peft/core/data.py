"""An endless, resumable stream of batches over any re-iterable of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.random_state import RandomState, replay


class DataStream:
    """Cycles through ``data`` for ever and can return to any position.

    What ``data`` draws from PyTorch's CPU generator (the order of a shuffled DataLoader) comes
    from a stream of the level's own, a function of the generator's state at construction and the
    level's name, so neither looking at a batch nor the other level changes what training draws.
    Generators that ``data`` carries, a loader's or its sampler's, are used as they are. An epoch
    is a function of the states at which it began; ``state_dict`` keeps these and the position.

    Raises:
        ProblemError: ``data`` is empty, or cannot be iterated twice.
    """

    def __init__(self, data: Iterable[Any], name: str) -> None:
        if not isinstance(data, Iterable) or isinstance(data, Tensor | Mapping | str):
            raise ProblemError(
                f"{name}: data must be an iterable of batches, such as a DataLoader or [batch], "
                f"got {type(data).__name__}"
            )
        if isinstance(data, Iterator):
            raise ProblemError(
                f"{name}: data is an iterator that can be read only once; give a re-iterable "
                "such as a DataLoader or a list of batches"
            )
        self.data, self.name = data, name
        if _length(data) == 0:
            raise ProblemError(self._empty())
        current = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        self._random = RandomState.seeded([], current, name).states["cpu"]
        self._iterator: Iterator[Any] | None = None
        self._epoch_state: dict[str, Tensor] = {}
        self._position = 0
        self._peeked: list[Any] = []

    def peek(self) -> Any:
        """The batch that ``next`` will return, which stays the next one."""
        if not self._peeked:
            self._peeked.append(self._draw())
        return self._peeked[0]

    def next(self) -> Any:
        """The next batch; after the last one of ``data`` the first of a new epoch."""
        batch = self.peek()
        self._peeked.clear()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: generator states, now and as the epoch began, and the position."""
        return {
            "now": self._capture(),
            "epoch_state": dict(self._epoch_state),
            "position": self._position,
            "peeked": bool(self._peeked),
        }

    def check_state(self, state: Any) -> None:
        """Raise ProblemError where ``state`` is not what ``state_dict`` returns."""
        expected = {"now", "epoch_state", "position", "peeked"}
        if not isinstance(state, Mapping) or set(state) != expected:
            raise ProblemError(f"{self.name}: the data's state must have {sorted(expected)}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch that followed when ``state`` was taken."""
        self._iterator, self._position = None, 0
        self._peeked.clear()
        if state["position"] > 0:
            self._restore(state["epoch_state"])
            for _ in range(state["position"]):
                batch = self._draw()
            if state["peeked"]:
                self._peeked.append(batch)
        self._restore(state["now"])

    def _draw(self) -> Any:
        with replay(RandomState({"cpu": self._random})):
            for _ in range(2):
                if self._iterator is None:
                    self._random = torch.get_rng_state()
                    self._epoch_state = self._capture()
                    self._iterator, self._position = iter(self.data), 0
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    self._iterator = None
                else:
                    self._position += 1
                    self._random = torch.get_rng_state()
                    return batch
        raise ProblemError(self._empty())

    def _empty(self) -> str:
        return f"{self.name}: data has no batch; the split is empty or smaller than one batch"

    def _generators(self) -> dict[str, torch.Generator]:
        """The generators that decide the order: the loader's own and its samplers'."""
        owners: dict[str, Any] = {"loader": self.data}
        owners |= {key: getattr(self.data, key, None) for key in ("sampler", "batch_sampler")}
        owners["inner_sampler"] = getattr(owners["batch_sampler"], "sampler", None)
        found = {key: getattr(owner, "generator", None) for key, owner in owners.items()}
        return {key: g for key, g in found.items() if isinstance(g, torch.Generator)}

    def _capture(self) -> dict[str, Tensor]:
        states = {key: g.get_state() for key, g in self._generators().items()}
        return {"stream": self._random, **states}

    def _restore(self, states: Mapping[str, Tensor]) -> None:
        self._random = states["stream"]
        for key, generator in self._generators().items():
            # A sampler that had no generator before its first epoch makes itself one.
            if key in states:
                generator.set_state(states[key])


def _length(data: Iterable[Any]) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:  # no length, or a loader over a stream
        return None
