"""An endless, resumable stream of a level's batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.random_state import RandomState, replay


def to_device(batch: object, device: torch.device) -> Any:
    """``batch`` on ``device``, including the tensors in mappings, lists and tuples."""
    return entrywise(batch, lambda x: x.to(device) if hasattr(x, "to") else None)


def entrywise(batch: object, function: Callable[[Any], Any]) -> Any:
    """``function`` of ``batch``, or if that is None, of the entries of a mapping, list or tuple."""
    if (result := function(batch)) is not None:
        return result
    if isinstance(batch, Mapping):
        return type(batch)({key: entrywise(x, function) for key, x in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        moved = [entrywise(value, function) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


class DataStream:
    """The batches of ``data``, epoch after epoch; any position can be restored.

    The stream has its own random states of PyTorch, NumPy and Python, seeded by PyTorch's state at
    construction and by ``name``. The batches therefore depend neither on `peek` nor on other
    levels. A generator that was given to the DataLoader or to its sampler is used unchanged. The
    generator states at the start of an epoch determine its order; ``state_dict`` has these states
    and the position in the epoch.
    """

    def __init__(self, data: Iterable[Any], name: str) -> None:
        require_batches(name, data)
        self.data, self.name = data, name
        current = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        self._random = RandomState.seeded([], current, name)
        self._iterator: Iterator[Any] | None = None
        self._epoch_state: dict[str, Any] = {}
        self._position = 0
        self._peeked: list[Any] = []

    def peek(self) -> Any:
        """The batch that ``next`` will return; the position does not change."""
        if not self._peeked:
            self._peeked.append(self._draw())
        return self._peeked[0]

    def next(self) -> Any:
        """The next batch; a new epoch begins after the last batch of ``data``."""
        batch = self.peek()
        self._peeked.clear()
        return batch

    def ahead(self, count: int) -> list[Any]:
        """The next ``count`` batches; the position does not change.

        To return to the position, the epoch is read again from its start.
        """
        state = self.state_dict()
        batches = [self.next() for _ in range(count)]
        self.load_state_dict(state)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The position, and the generator states now and at the start of the epoch."""
        return {
            "now": self._capture(),
            "epoch_state": dict(self._epoch_state),
            "position": self._position,
            "peeked": bool(self._peeked),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch that came next when ``state_dict`` returned ``state``."""
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
        drawing = type(self.data) not in (list, tuple)  # which draw no random numbers
        with replay(self._random) if drawing else nullcontext():
            for _ in range(2):
                if self._iterator is None:
                    self._random = RandomState.capture() if drawing else self._random
                    self._epoch_state = self._capture()
                    self._iterator, self._position = iter(self.data), 0
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    self._iterator = None
                else:
                    self._position += 1
                    self._random = RandomState.capture() if drawing else self._random
                    return batch
        raise ProblemError(_empty(self.name))

    def _generators(self) -> dict[str, torch.Generator]:
        """The generators that determine the order of the batches."""
        owners: dict[str, Any] = {"loader": self.data}
        owners |= {key: getattr(self.data, key, None) for key in ("sampler", "batch_sampler")}
        owners["inner_sampler"] = getattr(owners["batch_sampler"], "sampler", None)
        generators = {key: getattr(owner, "generator", None) for key, owner in owners.items()}
        return {key: g for key, g in generators.items() if isinstance(g, torch.Generator)}

    def _capture(self) -> dict[str, Any]:
        states = {key: g.get_state() for key, g in self._generators().items()}
        return {"stream": dict(self._random.states), **states}

    def _restore(self, states: Mapping[str, Any]) -> None:
        self._random = RandomState(states["stream"])
        for key, generator in self._generators().items():
            # A sampler may create its generator only in its first epoch.
            if key in states:
                generator.set_state(states[key])


def require_batches(name: str, data: object) -> None:
    """Raise ProblemError unless ``data`` has batches and can be iterated again."""
    if not isinstance(data, Iterable) or isinstance(data, Tensor | Mapping | str):
        raise ProblemError(
            f"{name}: data must be an iterable of batches, such as a DataLoader or [batch], "
            f"got {type(data).__name__}"
        )
    if isinstance(data, Iterator):
        raise ProblemError(
            f"{name}: data is an iterator, which can be read only once; give a DataLoader or a "
            "list of batches"
        )
    with suppress(TypeError):  # no length, or a loader over a stream
        if len(data) == 0:  # type: ignore[arg-type]
            raise ProblemError(_empty(name))


def _empty(name: str) -> str:
    return f"{name}: data has no batch; give a split that holds at least one batch"
