"""Trains a level of your own; returns the run and Φ."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from tqdm.auto import trange

from hyperopt_peft.attribution.run import Run
from hyperopt_peft.attribution.scores import Evaluation, Loss, Trained
from hyperopt_peft.core.problem import Problem, devices_of
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.utils.random_state import RandomState, replay


def trained_level(
    level: Problem,
    weights: Tensor | None,
    evaluation: Loss,
    training_steps: int | None,
    *,
    progress: bool = True,
    **options: Any,
) -> Trained:
    """Train ``level``, and return its run and Φ; see `attribute` and `train_level`."""
    leaf = isinstance(weights, Tensor) and weights.is_leaf and weights.requires_grad
    if weights is None or not leaf or weights.dim() != 1 or len(weights) == 0:
        raise ProblemError(
            "row_weights: must be a leaf tensor (n,) that requires a gradient, one weight per "
            "training row; use torch.ones(n, requires_grad=True)"
        )
    if not isinstance(training_steps, int) or training_steps < 1:
        raise ProblemError(
            f"training_steps: must be a number of steps, at least 1, got {training_steps}"
        )
    phi = Evaluation(weights, evaluation)
    run = train_level(level, weights, training_steps, progress=progress, **options)
    return Trained(run, phi, Accumulated(level), partial(_epoch, level), progress=progress)


def train_level(
    level: Problem, weights: Tensor, steps: int, *, progress: bool = False, **options: Any
) -> Run:
    """Train ``level`` for ``steps`` steps; ``options`` are arguments of `Run`.

    The backward pass of a step also gives the gradient with respect to the row weights.
    """
    run, begin = Run(level, weights, steps, **options), time.perf_counter()
    for number in trange(steps, disable=not progress, desc=level.name):
        batch, random_state = level.next_batch(), RandomState.capture(devices_of(level))
        try:
            gradient = level.gradient(batch, (*level.variables, weights)).gradient
        except NonFiniteError as error:
            raise NonFiniteError(f"step {number + 1}: {error}") from error
        run.record(batch, random_state, gradient)
        level.step(gradient[:-1])
    run.settings["seconds"] = time.perf_counter() - begin
    return run


def _epoch(level: Problem) -> Sequence[MicroBatch]:
    """One pass over the data of ``level``; each batch has a random state of its own."""
    data: Any = [None] if level.batches is None else level.batches.data
    with replay(RandomState.capture()):
        batches = enumerate(map(level.on_device, data))
        seeded = partial(RandomState.seeded, devices_of(level), "attribution")
        return [MicroBatch(batch, seeded(number)) for number, batch in batches]
