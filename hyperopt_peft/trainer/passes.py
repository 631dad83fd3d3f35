"""Counts the forward+backward passes that a training runs."""

from __future__ import annotations

import time
from collections import UserDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hyperopt_peft.utils.models import hook_calls, is_uncounted


class PassCounter(TrainerCallback):
    """Counts the passes and seconds of a training; both phases of a method are one training.

    A pass is one forward and one backward over as many rows as a lower step has, on this process.
    The forward is a third of a pass, and the first backward through the model the rest; a loss
    whose gradient stays above the model's outputs counts a third. A further backward over the same
    graph is a product of second derivatives, which also runs through the first one's graph: two
    passes. Forwards without gradients, and those within
    `uncounted`, do not count. A batch whose rows are joined into one, without
    padding, counts as a full micro-batch. ``unit`` is the number of rows of a pass, by default that
    of a lower step.
    """

    def __init__(self) -> None:
        self.unit: int | None = None
        self._batch, self._thirds = 1, 0  # whole numbers, so that a sum is exact
        self._hooks: list[Any] = []
        self.begin()

    def begin(self, passes: float = 0.0, seconds: float = 0.0) -> None:
        """Restart the count, at the given numbers of an earlier `read`."""
        self._earlier, self._thirds = passes, 0
        self._start = time.perf_counter() - seconds

    @property
    def passes(self) -> float:
        """The count since `begin`."""
        return self._earlier + self._thirds / (3 * self._batch)

    def read(self) -> dict[str, float]:
        """The ``passes`` and the ``seconds`` since `begin`."""
        return {"passes": self.passes, "seconds": time.perf_counter() - self._start}

    def on_train_begin(
        self, args: Any, state: object, control: object, model: Any = None, **_: Any
    ) -> None:
        """Count the passes of ``model`` from now on."""
        self._earlier, self._thirds = self.passes, 0
        self._micro = args.train_batch_size
        self._batch = self.unit or self._micro * args.gradient_accumulation_steps
        self._hooks += hook_calls(model, after=self._passed)

    def end(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _passed(self, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if is_uncounted() or not torch.is_grad_enabled():
            return
        read = _first(args) if args else _first(kwargs.values())
        followed = _first((output,), gradient=True)
        if followed is None:  # until TRL 1.15 the output of SFTTrainer has the loss alone
            followed = _first((output,), gradient=True, dimensions=0)
        if read is None or followed is None:
            return
        rows, before = len(read), False
        if rows == 1 and kwargs.get("position_ids") is not None:  # as TRL's padding_free
            rows = self._micro
        self._thirds += rows

        def backward(_: Tensor) -> None:
            nonlocal before
            self._thirds += rows * (6 if before else 2)
            before = True

        followed.register_hook(backward)


def passes_of_a_cycle(trainer: Any) -> float:
    """The predicted passes from one upper step of ``trainer`` to the next; one without them.

    All passes of an estimator but that of F are over the batch of a lower step. A hypergradient of
    unknown cost counts as two passes.
    """
    if trainer.upper is None:
        return 1.0
    pieces = 1 if trainer.upper_batches is None else trainer.upper_batches.count  # of F
    of_lower_batches = trainer.args.lower_steps + (trainer.estimator.cost() or 2) - 2
    return float(of_lower_batches + pieces / trainer.args.gradient_accumulation_steps)


def _first(values: Iterable[Any], gradient: bool = False, dimensions: int = 1) -> Tensor | None:
    """The first tensor with rows in nested ``values``; with ``gradient``, one that requires it."""
    for value in values:
        if isinstance(value, Tensor):
            if value.dim() >= dimensions and (value.requires_grad or not gradient):
                return value
        elif isinstance(value, dict | tuple | list | UserDict):
            parts = value if isinstance(value, tuple | list) else value.values()
            if (tensor := _first(parts, gradient, dimensions)) is not None:
                return tensor
    return None
