"""The run and Φ of levels of one's own: a `Problem`, or an `Engine` with two."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.attribution.evaluation import Evaluation, Loss
from hyperopt_peft.attribution.run import Run
from hyperopt_peft.attribution.scores import RetrainingSetup
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine.engine import Engine
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import RandomState, replay


def setup_from_levels(
    training: Problem | Engine,
    weights: Tensor | None,
    evaluation: Loss | Mapping[str, Loss],
    training_steps: int | None,
    **options: Any,
) -> RetrainingSetup:
    """Train ``training``, and return its run and Φ; ``options`` are those of `train_levels`.

    Arguments and errors are those of `attribute`.
    """
    leaf = isinstance(weights, Tensor) and weights.dim() == 1 and weights.is_leaf
    if weights is None or not leaf or not weights.requires_grad or len(weights) == 0:
        raise ProblemError(
            "row_weights: must be a leaf tensor (n,) that requires a gradient, with a weight for "
            "each training row; use torch.ones(n, requires_grad=True)"
        )
    if not isinstance(training_steps, int) or training_steps < 1:
        raise ProblemError(
            f"training_steps: must be the number of steps to train, from 1, got {training_steps}"
        )
    phi = Evaluation(weights, evaluation)
    if isinstance(training, Problem):
        levels, order, seed = [training], [0] * training_steps, 0
    else:
        if training.lower_step:
            raise ProblemError(
                "training: attribute() must see training from its first step; give a new Engine"
            )
        if training.lower_steps == "minimum":
            raise ProblemError(
                'training: attribute() differentiates the lower steps, and lower_steps="minimum" '
                "takes none; give a number of steps"
            )
        levels, seed = [training.lower, training.upper], training.seed
        search = ([0] * training.lower_steps + [1]) * training_steps
        order = [0] * training.warmup_steps + search
    run = train_levels(levels, weights, order, seed=seed, **options)
    shares = {name: 1 / len(phi.slices) for name in phi.slices}
    return RetrainingSetup(run, phi, shares, Accumulated(levels[0]), lambda: _epoch(levels[0]))


def train_levels(
    levels: Sequence[Problem],
    weights: Tensor,
    order: Sequence[int],
    *,
    seed: int = 0,
    memory_limit: float = 1.0,
    differentiated: bool = True,
    progress: bool = False,
) -> Run:
    """Train the lower level, and an upper one where there is one, and return the `Run`.

    ``order`` has the number of the level that moves, step by step; ``seed`` is that of the upper
    level's random numbers, as in `Engine`.

    Raises:
        ProblemError: see `Run`; or a loss does not read the weights.
        NonFiniteError: a loss or a gradient is NaN or infinite; the message names the step.
    """
    run = Run(levels, weights, len(order), memory_limit, differentiated=differentiated)
    begin = time.perf_counter()
    counts = [0 for _ in levels]
    for step, number in enumerate(tqdm(order, disable=not progress, desc=levels[0].name)):
        level, counts[number] = levels[number], counts[number] + 1
        batch, random_state = level.next_batch(), RandomState.capture(run.devices)
        upper = number > 0  # whose random numbers are none of the training stream
        if upper:
            key = (seed, counts[number], *distributed.rank_key())
            random_state = RandomState.seeded(run.devices, *key)
        try:
            with replay(random_state) if upper else nullcontext():
                result = level.gradient(batch, (*level.variables, weights))
        except NonFiniteError as error:
            raise NonFiniteError(f"step {step + 1}: {error}") from error
        run.record(run.update(number, batch, random_state, result.gradient))
        level.step(result.gradient[:-1], math.hypot(*result.norms[:-1]))
    run.settings["seconds"] = time.perf_counter() - begin
    return run


def _epoch(level: Problem) -> Sequence[MicroBatch]:
    """One pass over the data of ``level``, each batch with random numbers of its own."""
    data: Any = [None] if level.batches is None else level.batches.data
    with replay(RandomState.capture()):
        batches = [level.on_device(batch) for batch in data]
    return [
        MicroBatch(batch, RandomState.seeded(level.devices, "attribution", number))
        for number, batch in enumerate(batches)
    ]
