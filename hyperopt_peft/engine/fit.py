"""Training of a single level, by its optimizer or by L-BFGS to a minimum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine.step import prior_of
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.utils.restore import assign_


def fit(problem: Problem, steps: int, *, progress: bool = True) -> list[dict[str, Any]]:
    """Do ``steps`` optimizer steps of ``problem`` alone; returns a record for each.

    A record has ``step``, ``loss`` (without the prior), ``grad_norm`` and the metrics of the loss.
    A `Nested` level also trains its lower levels.

    Raises:
        ProblemError: the level has no optimizer.
        NonFiniteError: a loss or a gradient is NaN or infinite; the message names the step.

    Example:
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> _, lower = diabetes()
        >>> history = fit(lower, steps=10, progress=False)
        >>> history[-1]["loss"] < history[0]["loss"]
        True
    """
    history = []
    with trange(steps, disable=not progress, desc=problem.name) as bar:
        for step in bar:
            try:
                evaluation = problem.gradient(problem.next_batch(), problem.variables)
            except NonFiniteError as error:
                raise NonFiniteError(f"step {step + 1}: {error}") from error
            norm = problem.step(evaluation.gradient)
            loss = evaluation.loss - prior_of(problem, evaluation.metrics)
            record = {"step": step + 1, "loss": loss, "grad_norm": norm}
            history.append(record | evaluation.metrics)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    return history


def lbfgs(
    problem: Problem,
    batch: object = None,
    *,
    tolerance: float = 1e-4,
    max_steps: int = 500,
    factor: Tensor | None = None,
) -> int:
    """Move the variables from their current values towards a minimum of the loss, by L-BFGS.

    Nocedal 1980, doi:10.1090/S0025-5718-1980-0572855-7, with a strong Wolfe line search. The
    level's optimizer and data are not used. Returns the number of evaluations.

    Args:
        problem: a level with a deterministic loss.
        batch: the batch of all evaluations.
        tolerance: the method ends when no entry of the gradient exceeds this.
        max_steps: the largest number of steps.
        factor: R, upper triangular ``(d, d)``: the method moves R·W in place of the first variable
            W ``(d, k)``. Few steps are needed if RᵀR is near the second derivative of a column.

    Raises:
        NonFiniteError: the loss or the gradient is NaN or infinite; the variables have not moved.

    Example:
        >>> from hyperopt_peft.method import TaskLevel
        >>> w = torch.zeros(2, requires_grad=True)
        >>> level = TaskLevel(None, [w], task_loss=lambda target: (w - target).square().sum())
        >>> lbfgs(level, torch.tensor([3.0, 4.0])) < 10, w.detach().round(decimals=3)
        (True, tensor([3., 4.]))
    """
    first, *others = problem.variables
    moved = first if factor is None else (factor @ first).detach()
    optimizer = torch.optim.LBFGS(
        [moved, *others],
        max_iter=max_steps,
        max_eval=2 * max_steps,
        tolerance_grad=tolerance if factor is None else 0.0,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        if factor is not None:
            assign_([first], [torch.linalg.solve_triangular(factor, moved, upper=True)])
        evaluation = problem.gradient(batch, problem.variables)
        slopes = evaluation.gradient
        if factor is not None and slopes[0] is not None:
            largest = max(float(slope.abs().max()) for slope in slopes if slope is not None)
            of_moved = torch.linalg.solve_triangular(factor.T, slopes[0], upper=False)
            # Without a gradient the method ends.
            slopes = (of_moved, *slopes[1:]) if largest > tolerance else (None,) * len(slopes)
        for variable, slope in zip((moved, *others), slopes, strict=True):
            variable.grad = None if slope is None else slope.contiguous()
        return evaluation.loss

    before = [variable.detach().clone() for variable in problem.variables]
    try:
        optimizer.step(closure)
        if factor is not None:
            assign_([first], [torch.linalg.solve_triangular(factor, moved, upper=True)])
    except NonFiniteError:
        assign_(problem.variables, before)
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)
    return evaluations


def minimize(problem: Problem, *, tolerance: float = 1e-10, max_steps: int = 1000) -> float:
    """Move the variables to a minimum of a deterministic loss by L-BFGS; returns the loss.

    The method ends when no entry of the gradient exceeds ``tolerance``. The loss gets the batch
    None, and includes the prior; the level's optimizer and data are not used. The implicit formula
    for the hypergradient holds at such a minimum.

    Raises:
        ProblemError: an entry of the gradient exceeds 1,000 × ``tolerance`` after ``max_steps``;
            or the level is `Nested`.
        NonFiniteError: the loss or the gradient is NaN or infinite.

    Example:
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> loss = minimize(lower)
        >>> bool(lower.gradient(None, lower.variables).gradient[0].abs().max() < 1e-6)
        True
    """
    problem.require_single("L-BFGS would not train them; use fit")
    lbfgs(problem, tolerance=tolerance, max_steps=max_steps)
    final = problem.gradient(None, problem.variables)
    largest = max(float(slope.abs().max()) for slope in final.gradient if slope is not None)
    if largest > 1000 * tolerance:
        raise ProblemError(
            f"{problem.name}: the gradient is {largest:.2g} after {max_steps} steps; regularise "
            "the loss, or give a larger tolerance"
        )
    return final.loss
