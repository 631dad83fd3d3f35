"""Trains a level of your own; returns the run and Φ."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from hyperopt_peft.attribution.run import Run
from hyperopt_peft.attribution.scores import Evaluation, Loss, Trained
from hyperopt_peft.core.problem import LossGradient, Problem, devices_of
from hyperopt_peft.engine.fit import fit
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.utils.random_state import RandomState, replay


def trained_level(
    level: Problem,
    weights: Tensor | None,
    evaluation: Loss,
    training_steps: int | None,
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
    run = train_level(level, weights, training_steps, **options)
    progress = bool(options.get("progress"))
    return Trained(run, phi, Accumulated(level), partial(_epoch, level), progress=progress)


def train_level(
    level: Problem, weights: Tensor, steps: int, *, progress: bool = False, **options: Any
) -> Run:
    """Train ``level`` for ``steps`` steps; ``options`` are arguments of `Run`."""
    run, begin = Run(level, weights, steps, **options), time.perf_counter()
    with _recorded(run):
        fit(level, steps, progress=progress)
    run.settings["seconds"] = time.perf_counter() - begin
    return run


@contextmanager
def _recorded(run: Run) -> Iterator[None]:
    """Record in ``run`` each step that the body makes with its level.

    `fit` calls `Problem.gradient`, then `Problem.step`. The backward pass of the gradient also
    gives the gradient with respect to the row weights.
    """
    level = run.level
    gradient, step = level.gradient, level.step
    last: list[Any] = []

    def recorded_gradient(batch: Any, variables: Sequence[Tensor]) -> LossGradient:
        random_state = RandomState.capture(devices_of(level))
        result = gradient(batch, (*variables, run.weights))
        last[:] = batch, random_state, result.gradient
        return replace(result, gradient=result.gradient[:-1], norms=result.norms[:-1])

    def recorded_step(slope: Sequence[Tensor | None], norm: float | None = None) -> float:
        run.record(*last)
        return step(slope, norm)

    vars(level).update(gradient=recorded_gradient, step=recorded_step)
    try:
        yield
    finally:
        del level.gradient, level.step


def _epoch(level: Problem) -> Sequence[MicroBatch]:
    """One pass over the data of ``level``; each batch has a random state of its own."""
    data: Any = [None] if level.batches is None else level.batches.data
    with replay(RandomState.capture()):
        batches = enumerate(map(level.on_device, data))
        seeded = partial(RandomState.seeded, devices_of(level), "attribution")
        return [MicroBatch(batch, seeded(number)) for number, batch in batches]
