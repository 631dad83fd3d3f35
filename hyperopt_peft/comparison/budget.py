"""A budget in passes: one forward and backward over a training batch; counted, and sized."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback


class PassCounter(TrainerCallback):
    """Counts the rows that a run sends forward and backward through its model.

    The first backward pass of a forward pass counts its rows once. A further one over the same
    graph is a product of second derivatives, which goes through the graph of the first backward
    pass too, and counts them twice. Forward passes without a gradient count nothing.

    Args:
        limit: the rows after which the training ends, so that a solver that takes more products
            later in a run than at first does not exceed the budget.

    Example:
        >>> from torch import nn, ones
        >>> counter, model = PassCounter(), nn.Linear(2, 1)
        >>> counter.on_train_begin(None, None, None, model=model)
        >>> model(ones(6, 2)).sum().backward()
        >>> counter.on_train_end(None, None, None)
        >>> counter.rows
        6
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.rows, self.limit = 0, limit

    def __copy__(self) -> Self:
        """The counter itself: both phases of a method are one run."""
        return self

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Count the passes of ``model`` from now on."""
        self._hook = model.register_forward_hook(self._passed, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the training at the limit."""
        control.should_training_stop |= self.rows >= self.limit

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count no longer."""
        self._hook.remove()

    def _passed(self, model: Any, args: Any, kwargs: Any, output: Any) -> None:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        outputs = [x for x in tree_leaves(dict(output) if hasattr(output, "keys") else output)]
        followed = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad and x.dim()]
        if not (torch.is_grad_enabled() and inputs and followed):
            return
        rows, before = len(inputs[0]), False

        def backward(_: Tensor) -> None:
            nonlocal before
            self.rows += rows * (2 if before else 1)
            before = True

        followed[0].register_hook(backward)


def rows_of(steps: int, rows: int, batch: int) -> int:
    """The rows that ``steps`` steps read of ``rows`` rows; an epoch's last batch may be smaller.

    Example:
        >>> [rows_of(steps, 10, 4) for steps in (2, 3, 4)]
        [8, 10, 14]
    """
    epochs, rest = divmod(steps, -(-rows // batch))
    return epochs * rows + min(rest * batch, rows)


def steps_for(allowed: float, rows: int, batch: int) -> int:
    """The most steps that read at most ``allowed`` rows.

    Example:
        >>> [steps_for(allowed, 10, 4) for allowed in (7, 8, 10, 14)]
        [1, 2, 3, 4]
    """
    epochs, rest = divmod(int(allowed), rows)
    return epochs * -(-rows // batch) + rest // batch


def phases(
    passes: float, *, lower: int, everything: int, batch: int, every: int, upper: float, again: bool
) -> tuple[int, int]:
    """The steps of the search and of the second training, which together take ``passes`` passes.

    Both have about as many steps. The search ends with an upper step.

    Args:
        passes: the budget.
        lower, everything: the rows of the lower level, and of both.
        batch: the rows of a lower step.
        every: the lower steps from one upper step to the next.
        upper: the rows that an upper step sends through the model beside those of its lower step.
        again: whether there is a second training.

    Example:
        >>> phases(300, lower=80, everything=100, batch=10, every=4, upper=20, again=True)
        (120, 120)
    """
    a_cycle = rows_of(every, lower, batch) + upper
    share = a_cycle + (rows_of(every, everything, batch) if again else 0)
    search = max(1, int(passes * batch // share)) * every
    spent = rows_of(search, lower, batch) + search // every * upper
    left = passes * batch - spent
    return search, steps_for(left, everything, batch) if again else 0
