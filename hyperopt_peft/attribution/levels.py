"""Trains levels of your own, a `Problem` or an `Engine`; returns the run and Φ."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from hyperopt_peft.attribution.run import Run
from hyperopt_peft.attribution.scores import Evaluation, Loss, Trained
from hyperopt_peft.core.problem import LossGradient, Problem, devices_of
from hyperopt_peft.engine.engine import Engine
from hyperopt_peft.engine.fit import fit
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.utils.random_state import RandomState, replay


def trained_levels(
    training: Problem | Engine,
    weights: Tensor | None,
    evaluation: Loss | Mapping[str, Loss],
    training_steps: int | None,
    **options: Any,
) -> Trained:
    """Train ``training``, and return its run and Φ; see `attribute` and `train_levels`."""
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
    run = train_levels(training, weights, training_steps, **options)
    shares = {name: 1 / len(phi.slices) for name in phi.slices}
    lower, progress = run.levels[0], bool(options.get("progress"))
    return Trained(run, phi, shares, Accumulated(lower), partial(_epoch, lower), progress=progress)


def train_levels(
    training: Problem | Engine,
    weights: Tensor,
    steps: int,
    *,
    progress: bool = False,
    **options: Any,
) -> Run:
    """Train for ``steps`` steps, of an Engine upper steps; ``options`` are arguments of `Run`."""
    if isinstance(training, Problem):
        run = Run([training], weights, steps, **options)
        train = partial(fit, training, steps, progress=progress)
    else:
        if training.lower_step or training.lower_steps == "minimum":
            raise ProblemError(
                "training: attribute() needs every step from the first one; give a new Engine, "
                "with a number of lower_steps"
            )
        length = training.warmup_steps + (training.lower_steps + 1) * steps
        run = Run([training.lower, training.upper], weights, length, **options)
        train = partial(training.run, steps)
    begin = time.perf_counter()
    with ExitStack() as stack:
        for number in range(len(run.levels)):
            stack.enter_context(_recorded(run, number))
        train()
    run.settings["seconds"] = time.perf_counter() - begin
    return run


@contextmanager
def _recorded(run: Run, number: int) -> Iterator[None]:
    """Record in ``run`` each step that the body makes with its level ``number``.

    A training loop calls `Problem.gradient`, then `Problem.step`. The backward pass of the gradient
    also gives the gradient with respect to the row weights.
    """
    level = run.levels[number]
    gradient, step, count = level.gradient, level.step, len(level.variables)
    last: list[Any] = []

    def recorded_gradient(batch: Any, variables: Sequence[Tensor]) -> LossGradient:
        random_state = RandomState.capture(devices_of(*run.levels))
        result = gradient(batch, (*variables, run.weights))
        *of_variables, of_weights = result.gradient
        last[:] = batch, random_state, (*of_variables[:count], of_weights)
        return replace(result, gradient=tuple(of_variables), norms=result.norms[:-1])

    def recorded_step(slope: Sequence[Tensor | None], norm: float | None = None) -> float:
        run.record(run.update(number, *last))
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
