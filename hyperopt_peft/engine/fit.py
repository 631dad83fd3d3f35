"""One level alone: a baseline, a warm start, a retraining, a solved lower level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import trange

from hyperopt_peft.core.chain import is_chain, prepare
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import NonFiniteError, ProblemError


def fit(
    problem: Problem,
    steps: int,
    *,
    callbacks: Sequence[Callable[[Problem, dict[str, Any]], object]] = (),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Do ``steps`` optimizer steps of ``problem`` on its own; returns a record for each.

    A record has ``step``, ``loss``, ``grad_norm`` and the loss's metrics, and is given to
    each of ``callbacks`` as ``callback(problem, record)``. A `Nested` level trains the levels below
    as well.

    Raises:
        NonFiniteError: a NaN or infinite loss or gradient; the message names the step.
    """
    history = []
    with trange(steps, disable=not progress, desc=problem.name) as bar:
        for step in bar:
            try:
                prepare(problem)
                evaluation = problem.gradient(problem.next_batch(), problem.variables)
            except NonFiniteError as error:
                raise NonFiniteError(f"step {step + 1}: {error}") from error
            norm = problem.step(evaluation.gradient)
            record = {"step": step + 1, "loss": evaluation.loss, "grad_norm": norm}
            record |= evaluation.metrics
            history.append(record)
            bar.set_postfix(loss=f"{evaluation.loss:.4f}", refresh=False)
            for callback in callbacks:
                callback(problem, record)
    return history


def minimize(problem: Problem, *, tolerance: float = 1e-10, max_steps: int = 1000) -> float:
    """Move the variables to a minimum of a deterministic, full-batch loss by L-BFGS.

    For reference problems and small lower levels, where an implicit hypergradient is wanted at
    the minimum itself; the level's own optimizer and data are not used. Ends where no entry of
    the gradient exceeds ``tolerance``, and returns the loss.

    Raises:
        ProblemError: the gradient is still above 1,000 × ``tolerance`` after ``max_steps``, or the
            level stands on others.
        NonFiniteError: the loss or the gradient is NaN or infinite.
    """
    if is_chain(problem):
        raise ProblemError(f"{problem.name} stands on other levels; train it by fit")
    optimizer = torch.optim.LBFGS(
        problem.variables,
        max_iter=max_steps,
        max_eval=2 * max_steps,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        evaluation = problem.gradient(None, problem.variables)
        for variable, part in zip(problem.variables, evaluation.gradient, strict=True):
            variable.grad = part
        return evaluation.loss

    optimizer.step(closure)
    final = problem.gradient(None, problem.variables)
    optimizer.zero_grad(set_to_none=True)
    largest = max(float(part.abs().max()) for part in final.gradient if part is not None)
    if largest > 1000 * tolerance:
        raise ProblemError(
            f"{problem.name}: the gradient is {largest:.2g} after {max_steps} steps; regularise "
            "the loss, or give a larger tolerance"
        )
    return final.loss


minimise = minimize
