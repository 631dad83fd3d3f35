"""An endless, resumable stream of batches over any re-iterable of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.errors import ProblemError


class Batches:
    """Cycles through ``data`` for ever and can return to any position.

    An epoch is a function of the random state at which it began: the state of PyTorch's CPU
    generator and of the generators that ``data`` carries (a DataLoader's or its sampler's).
    ``state_dict`` keeps that state and the position; ``load_state_dict`` begins the same
    epoch again and skips to the position.

    Raises:
        ProblemError: ``data`` is empty, or an iterator that can be read only once.
    """

    def __init__(self, data: Iterable[Any], name: str) -> None:
        if not isinstance(data, Iterable):
            raise ProblemError(
                f"{name}: data must be an iterable of batches, got {type(data).__name__}"
            )
        if isinstance(data, Iterator):
            raise ProblemError(
                f"{name}: data is an iterator that can be read only once; give a re-iterable "
                "such as a DataLoader or a list of batches"
            )
        self.data, self.name = data, name
        if isinstance(data, Sized) and len(data) == 0:
            raise ProblemError(self._empty())
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
        """Where the stream is: the random state its epoch began with, and the position."""
        return {
            "epoch_state": dict(self._epoch_state),
            "position": self._position,
            "peeked": bool(self._peeked),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch that followed when ``state`` was taken.

        PyTorch's CPU generator is left as it was found.
        """
        self._iterator, self._position = None, 0
        self._peeked.clear()
        if state["position"] == 0:
            return
        with torch.random.fork_rng(devices=[]):
            self._restore(state["epoch_state"])
            for _ in range(state["position"]):
                batch = self._draw()
        if state["peeked"]:
            self._peeked.append(batch)

    def _draw(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._epoch_state = self._capture()
                self._iterator, self._position = iter(self.data), 0
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = None
            else:
                self._position += 1
                return batch
        raise ProblemError(self._empty())

    def _empty(self) -> str:
        return f"{self.name}: data has no batch; the split is empty or smaller than one batch"

    def _generators(self) -> dict[str, torch.Generator]:
        """The generators that decide the order, of the loader, its samplers and its dataset."""
        owners: dict[str, Any] = {"loader": self.data}
        owners |= {key: getattr(self.data, key, None) for key in ("sampler", "batch_sampler")}
        owners["inner_sampler"] = getattr(owners["batch_sampler"], "sampler", None)
        found = {key: getattr(owner, "generator", None) for key, owner in owners.items()}
        return {key: g for key, g in found.items() if isinstance(g, torch.Generator)}

    def _capture(self) -> dict[str, Tensor]:
        states = {key: g.get_state() for key, g in self._generators().items()}
        return {"default": torch.get_rng_state(), **states}

    def _restore(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["default"])
        for key, generator in self._generators().items():
            generator.set_state(states[key])
