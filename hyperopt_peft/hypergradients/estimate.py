"""The hypergradient of two levels at the current point."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor

from hyperopt_peft.core.problem import Problem, devices_of
from hyperopt_peft.core.validation import shared_memory
from hyperopt_peft.errors import HypergradientWarning, ProblemError
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.products import (
    NO_EXACT_PRODUCT,
    Passes,
    ProductKind,
    default_epsilon,
)
from hyperopt_peft.hypergradients.registry import DEFAULT, EstimatorLike, get_estimator
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.reductions import squares, to_floats
from hyperopt_peft.utils.restore import TensorPool

#: A placeholder for the next batch of a level's data.
NEXT = object()
#: A relative residual above which `hypergradient` warns, and a training's line shows it.
LARGE_RESIDUAL = 0.1
CURVATURE = 1e-3  # the relative error of an exact product that `disagreement` finds
MARGIN = 10.0  # times the change from a difference over h to one over 2h
#: Advice for a wrong exact product.
WRONG_PRODUCT = (
    'choose product="difference"; look for weight_norm, or a custom autograd function whose '
    "backward pass is in no_grad() or reads .data"
)


def open_oracle(
    upper: Problem,
    lower: Problem,
    *,
    upper_batch: object = NEXT,
    lower_batch: object = NEXT,
    seed: int | None = None,
) -> Oracle:
    """The oracle of two levels at the current point, outside training.

    By default the batches are the next ones of the levels' data, whose position does not change.
    The random numbers of both losses start from the current random state, or from ``seed``.

    Raises:
        ProblemError: variables of the two levels share memory.

    Example:
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> with open_oracle(*diabetes()).open() as oracle:
        ...     oracle.lower_gradient().numel()
        10
    """
    check_ownership(upper, lower)
    devices = devices_of(upper, lower)
    current = RandomState.capture(devices)

    def state(level: str) -> RandomState:
        return current if seed is None else RandomState.seeded(devices, seed, level)

    upper_batch = upper.peek_batch() if upper_batch is NEXT else upper.on_device(upper_batch)
    lower_batch = lower.peek_batch() if lower_batch is NEXT else lower.on_device(lower_batch)
    return Oracle(upper, lower, upper_batch, lower_batch, state("upper"), state("lower"))


def check_ownership(*levels: Problem) -> None:
    """Raise ProblemError if variables of two levels share memory, or a level is not a Problem."""
    for level in levels:
        if not isinstance(level, Problem):
            raise ProblemError(f"a level must be a Problem, got {type(level).__name__}")
        if not hasattr(level, "variables"):
            raise ProblemError(
                f"{type(level).__name__}: has no variables; call super().__init__(variables) in "
                "its __init__"
            )
    for level in levels[:-1]:
        level.require_single(
            "only the last level may be Nested; write a chain of four levels as Engine(first, "
            "Nested(second, Nested(third, fourth)))"
        )
    named = [
        (f"{level.name}'s {name}", variable)
        for level in (below for each in levels for below in each.levels)
        for name, variable in zip(level.names, level.variables, strict=True)
    ]
    if pair := shared_memory(named):
        raise ProblemError(
            f"{pair[0]} and {pair[1]} share memory; give the tensor to one level, or a clone()"
        )


def check_estimator(estimator: Estimator, upper: Problem, lower: Problem) -> None:
    """Raise ProblemError if ``estimator`` cannot be used with the levels."""
    estimator.check_levels(upper, lower)
    needs = estimator.requirements
    if needs.second_derivatives:
        lower.require_single(f"{estimator.name}: {NO_EXACT_PRODUCT}")
    if needs.history > 1:
        lower.require_single(
            f"{estimator.name} needs the last {needs.history} steps, and its lower levels "
            "have moved since; choose steps=1, or a solver"
        )


def hypergradient(
    upper: Problem,
    lower: Problem,
    estimator: EstimatorLike = DEFAULT,
    *,
    upper_batch: object = NEXT,
    lower_batch: object = NEXT,
    seed: int | None = None,
) -> tuple[Tensor, ...]:
    """dF/du at the current point: one tensor for each upper variable, in its shape and dtype.

        dF/du = ∂F/∂u − ∂²f/∂u∂w · [∂²f/∂w²]⁻¹ · ∂F/∂w

    Parameters, buffers, gradients, optimizers, data and random states are restored bit for bit,
    even after an exception.

    Args:
        upper: the upper level, with loss F.
        lower: the lower level, with loss f, at (or near) its minimum for the current u.
        estimator: an estimator, its name with options, ``"cg:steps=40"``, or a function
            ``(matvec, b) -> v``.
        upper_batch, lower_batch: the batches of the losses; by default the next batch of each
            level's data, or None for a level without data.
        seed: the seed of both losses' random numbers (dropout); by default they start from the
            current random state.

    Raises:
        ProblemError: the estimator or an option is unknown; the levels share a tensor; a loss is
            invalid or writes to a variable (the new value stays); or a hook may change the
            ``.grad`` of a variable.
        NonFiniteError: a loss, a gradient, a curvature or the result is NaN or infinite.

    Warns:
        HypergradientWarning: exact products are not differences of gradients, by five more passes;
            or the relative residual of the solve is above 0.1. Training logs the ``residual`` of
            each step, and warns once if it is above 1.5.

    Example:
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> lower.solve()
        >>> [tuple(part.shape) for part in hypergradient(upper, lower, "cg")]
        [(10,)]
    """
    estimator = get_estimator(estimator)
    oracle = open_oracle(upper, lower, upper_batch=upper_batch, lower_batch=lower_batch, seed=seed)
    check_estimator(estimator, upper, lower)
    result = oracle.estimate(estimator)
    if words := check_products(estimator, oracle):
        warn(words)
    if (result.residual or 0.0) > LARGE_RESIDUAL:
        warn(of_residual(estimator, result))
    return like(result.hypergradient, upper.variables)


def of_residual(estimator: Estimator, result: Estimate) -> str:
    """A warning about the residual of ``result``."""
    reason = f" ({result.note})" if result.note else ""
    return (
        f"{estimator.name}: the relative residual is {result.residual:.3g} after "
        f"{result.steps} steps{reason}, so the implicit term may be far off; take more steps, "
        "add damping, or choose an estimator by compare_hypergradients"
    )


def disagreement(
    names: Sequence[str],
    exact: Iterable[Tensor],
    near: Iterable[Tensor],
    far: Iterable[Tensor],
    floor: float | None = None,
) -> str:
    """The variable in which ``exact`` is not the difference ``near``, in words; else empty.

    ``near`` and ``far`` are differences over h and 2h, which err by different kinks, rounding and
    truncation: their difference is the tolerance. An error below ``floor`` is none; by default that
    is ‖near − far‖.
    """
    triples = zip(exact, near, far, strict=True)  # one at a time, for memory
    read = to_floats([x for e, n, f in triples for x in squares([e - n, n - f, n])])
    aparts, errors, sizes = ([square**0.5 for square in read[k::3]] for k in range(3))
    floor = math.hypot(*errors) if floor is None else floor
    wrong = [
        (apart / (size or apart), name)
        for name, apart, error, size in zip(names, aparts, errors, sizes, strict=True)
        if apart > MARGIN * error + CURVATURE * size + floor
    ]
    if not wrong:
        return ""
    worst, name = max(wrong)
    return f"an exact product differs by {worst:.0%} from differences of gradients in {name}"


def check_products(estimator: Estimator, oracle: Oracle) -> str:
    """A warning if exact products of f with ∂F/∂w are not differences of its gradients; else empty.

    Five passes and a product, which ``oracle`` does not count; nothing where ``estimator`` needs no
    exact product, or f has no differences.
    """
    if not (estimator.requirements.second_derivatives and oracle.upper_gradient.norm):
        return ""
    alone = replace(oracle, passes=Passes(), copies=oracle.copies and TensorPool())
    alone.upper_gradient = oracle.upper_gradient
    h = float(default_epsilon(oracle.lower.variables, beside=oracle.upper.variables))
    names = [f"{level.name}'s {n}" for level in (oracle.lower, oracle.upper) for n in level.names]

    def along_b(kind: ProductKind, epsilon: float | None = None) -> tuple[Tensor, ...]:
        with alone.product(kind, epsilon=epsilon) as product:
            of_w, of_u = product.both(alone.upper_gradient.b)
        return (*of_w, *of_u)

    words = ""
    with suppress(ProblemError), alone.open():
        near, far = along_b("difference", h), along_b("difference", 2 * h)
        words = disagreement(names, along_b("exact"), near, far)
    return words and f"{estimator.name}: {oracle.lower.name}: {words}; {WRONG_PRODUCT}"


def warn(words: str) -> None:
    """Give a HypergradientWarning at the line that called the caller."""
    warnings.warn(words, HypergradientWarning, stacklevel=3)


def like(vector: Sequence[Tensor] | Any, variables: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parts of ``vector`` in the dtypes of ``variables``."""
    return tuple(part.to(variable.dtype) for part, variable in zip(vector, variables, strict=True))
