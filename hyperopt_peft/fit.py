"""Training one level alone: a baseline, a warm start, a retraining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import trange

from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.problem import Problem


def fit(
    problem: Problem,
    steps: int,
    *,
    callbacks: Sequence[Callable[[dict[str, Any]], object]] = (),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Do ``steps`` optimizer steps of ``problem`` on its own; returns a record for each.

    A record has ``step``, ``loss``, ``gradient_norm`` and the loss's metrics, and is given to
    each of ``callbacks``.

    Raises:
        NonFiniteError: a NaN or infinite loss or gradient; the message names the step.
    """
    history = []
    with trange(steps, disable=not progress, desc=problem.name) as bar:
        for step in bar:
            try:
                evaluation = problem.gradient(problem.next_batch(), problem.variables)
            except NonFiniteError as error:
                raise NonFiniteError(f"step {step + 1}: {error}") from error
            norm = problem.step(evaluation.gradient)
            record = {"step": step + 1, "loss": evaluation.loss, "gradient_norm": norm}
            record |= evaluation.metrics
            history.append(record)
            bar.set_postfix(loss=f"{evaluation.loss:.4f}", refresh=False)
            for callback in callbacks:
                callback(record)
    return history
