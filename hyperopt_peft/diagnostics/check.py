"""A check of two levels, with findings in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.core.problem import LossGradient, Problem, devices_of
from hyperopt_peft.core.validation import NO_WRITES, rewritten, unwritten
from hyperopt_peft.diagnostics.batches import batch_findings
from hyperopt_peft.diagnostics.curvature import Curvature, measure_curvature
from hyperopt_peft.diagnostics.derivatives import wrong_derivatives
from hyperopt_peft.diagnostics.findings import Check, Finding, Severity
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimate import NEXT, check_ownership, open_oracle
from hyperopt_peft.hypergradients.implicit.minres import MINRES
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import Passes, ProductKind
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.signal_to_noise import ADVICE, MIN_SAMPLES, SignalToNoise
from hyperopt_peft.utils.validation import require_count
from hyperopt_peft.utils.vector import Vector, machine_epsilon


def check_problem(
    upper: Problem,
    lower: Problem,
    *,
    upper_batch: object = NEXT,
    lower_batch: object = NEXT,
    upper_batches: Sequence[object] | None = None,
    lower_batches: Sequence[object] | None = None,
    seed: int = 0,
    solver_steps: int = 10,
    progress: bool = True,
) -> Check:
    """Check two levels at the current point, before or after training.

    Errors: a tensor that both levels own; a variable that no loss reads; a loss that is not a
    scalar with a gradient, is not finite, writes to a variable, or does not only depend on its
    batch, the variables and the random state; a post-accumulate hook; wrong second derivatives of
    f. Warnings: a gradient that is not the derivative of its loss (because of ``detach()``, as in
    PEFT's DoRA, or a hook); rows in both batches; a sum over rows; no implicit term; f without
    second derivative; negative curvature; a linear system that ``solver_steps`` steps do not solve;
    a lower level far from its minimum; an implicit term that cancels the direct one, because the
    lower variables absorb the upper ones.

    Derivatives are compared with central differences in float64, in one random direction. This
    misses errors below a thousandth of a variable's part, that the batch does not reach, or that
    are absent in float64. The distance from the lower minimum is the change of the hypergradient by
    a Newton step on copies of w, over ‖direct‖ + ‖implicit‖; above 0.1 it is a warning. It is
    measured on one batch: if f is a mean over data, give a large ``lower_batch``.

    `Check.signal_to_noise` describes a hypergradient from one batch of each level; it is measured
    over several pairs of batches and dropout masks, and below 1 it is a warning. `Check.curvature`
    recommends a damping for ``cg``, ``minres`` and ``warm``. All state is restored bit for bit.

    The cost is at most 5·``solver_steps`` second-derivative products and some thirty passes, and
    for each pair of batches ``solver_steps`` products and three passes (twice if the terms cancel).

    Args:
        upper_batch, lower_batch: the batches; by default the next batch of each level's data.
            Levels for a Trainer have no data, and need batches.
        upper_batches, lower_batches: the batches for `Check.signal_to_noise`; by default the next
            four of each level's data, or the single batch of a level without data. The shorter
            sequence is repeated. One batch of each level gives no ratio.
        seed: the seed of the losses' random numbers.
        solver_steps: the number of steps of each solver.

    Raises:
        ProblemError: ``solver_steps`` is not positive.
        Exception: any other exception that a loss raises.

    Example:
        >>> from hyperopt_peft import check_problem
        >>> from hyperopt_peft.engine import minimize
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> [finding.kind for finding in check_problem(upper, lower, progress=False).findings]
        ['far from stationary']
        >>> _ = minimize(lower)
        >>> check_problem(upper, lower, progress=False).ok
        True
    """
    require_count("solver_steps", solver_steps, least=1)
    try:
        check_ownership(upper, lower)
    except ProblemError as error:
        advice = "each level needs tensors of its own"
        return Check((Finding("shared tensor", "error", "both levels", str(error), advice),))
    oracle = open_oracle(upper, lower, upper_batch=upper_batch, lower_batch=lower_batch, seed=seed)
    pairs = _pairs(oracle, upper_batches, lower_batches)
    with ExitStack() as stack:
        most = 5 * solver_steps + 33 + 2 * len(pairs) * (solver_steps + 3)
        bar = tqdm(total=most, desc="check", unit="pass", leave=False, disable=not progress)
        oracle.passes = Passes(update=stack.enter_context(bar).update)
        start = stack.enter_context(perturbed((*upper.variables, *lower.variables)))
        stack.enter_context(oracle.open())
        return _Examination(oracle, start, seed, solver_steps, pairs).result()


def _pairs(oracle: Oracle, *of_levels: Sequence[Any] | None) -> list[tuple[Any, Any]]:
    """Pairs of an upper and a lower batch; none if all pairs would be equal."""
    both = []
    levels = ((oracle.upper, oracle.upper_batch), (oracle.lower, oracle.lower_batch))
    for (level, batch), batches in zip(levels, of_levels, strict=True):
        if batches is None:
            batches = [batch] if level.batches is None else level.batches.ahead(MIN_SAMPLES)
        both.append([level.on_device(each) for each in batches])
    count = max(map(len, both))
    return list(islice(zip(*map(cycle, both)), count if count > 1 else 0))


#: The kinds of findings that are errors; the others are warnings.
ERRORS = {"in-place edit", "not reproducible", "unread variable", "not finite", "bad loss"}
#: The terms cancel if ‖direct + implicit‖/‖direct‖ is below this plus min(this, the residual).
CANCELS = 0.02
#: Advice for findings whose advice does not depend on numbers.
REMEDIES = {
    "in-place edit": NO_WRITES,
    "not reproducible": "draw from the global generators of PyTorch, NumPy or Python, which are "
    "replayed, and store nothing between calls",
    "unread variable": "use it in the loss, or do not give it to the level",
    "no implicit term": "let the upper loss read the lower variables; without this the "
    "hypergradient is the direct term",
    "no mixed derivative": "let the lower loss combine both levels' variables; without this the "
    "hypergradient is the direct term",
    "absorbed": "add a larger penalty on the upper variables, or on weights they scale, to the "
    "lower loss; compare with a run in which they are frozen",
    "far from stationary": "take more lower steps before the first upper step and before each one",
    "noisy hypergradient": f"try {ADVICE}",
}


@dataclass
class _Examination:
    """The findings so far; ``start`` holds copies of all variables, the upper ones first."""

    oracle: Oracle
    start: tuple[Tensor, ...]
    seed: int
    solver_steps: int
    pairs: Sequence[tuple[Any, Any]]
    findings: list[Finding] = field(default_factory=list)
    curvature: Curvature | None = None
    signal_to_noise: float | None = None
    not_compared: str = ""
    envelope: float = math.inf  # ‖∂f/∂u‖/‖∂F/∂u‖

    def result(self) -> Check:
        """All findings and measurements."""
        self._examine()
        findings = sorted(self.findings, key=lambda finding: finding.severity)
        return Check(tuple(findings), self.curvature, self.signal_to_noise, self.not_compared)

    def _examine(self) -> None:
        oracle = self.oracle
        above = self._first_order(oracle.upper, oracle.upper_batch, oracle.upper_random)
        below = self._first_order(oracle.lower, oracle.lower_batch, oracle.lower_random)
        if above is None or below is None:
            return
        self._unread(above.gradient, below.gradient)
        self.findings += batch_findings(oracle)
        if self._has_error:
            return
        try:
            self.findings += wrong_derivatives(oracle, self.seed)
        except Exception as error:  # the loss raised none in its own precision
            self.not_compared = f"{type(error).__name__}: {error}"
        exact = not (oracle.lower.nested or self._has_error)
        self._second_order("exact" if exact else "difference")

    def _add(self, kind: str, level: Problem, words: str, advice: str = "") -> None:
        severity: Severity = "error" if kind in ERRORS else "warning"
        self.findings.append(Finding(kind, severity, level.name, words, advice or REMEDIES[kind]))

    @property
    def _has_error(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def _variables(self) -> tuple[Tensor, ...]:
        return (*self.oracle.upper.variables, *self.oracle.lower.variables)

    def _first_order(self, level: Problem, batch: Any, random: RandomState) -> LossGradient | None:
        """Add findings from a few evaluations of a loss; None if the loss has no gradient."""
        evaluation, before = None, len(self.findings)
        try:
            with unwritten(self.oracle.upper, self.oracle.lower):
                evaluation = self._evaluate(level, batch, random)
        except NonFiniteError as error:
            words = str(error).removeprefix(f"{level.name}: ")
            advice = "look for a logarithm or a division of zero, or for values that are NaN"
            self._add("not finite", level, words, advice)
        except ProblemError as error:
            words, _, advice = str(error).removeprefix(f"{level.name}: ").rpartition("; ")
            kind = "in-place edit" if "a loss writes to" in words else "bad loss"
            self._add(kind, level, words, advice)
        except RuntimeError as error:  # autograd refuses some edits in place
            if not any(word in str(error) for word in ("in-place", "inplace")):
                raise
            self._add("in-place edit", level, f"the loss edits a tensor in place: {error}")
        # Even through ``.data``.
        if edited := rewritten((self.oracle.upper, self.oracle.lower), self.start):
            assign_(self._variables, self.start)
            if len(self.findings) == before:
                self._add("in-place edit", level, f"the loss writes to {', '.join(edited)}")
        if evaluation is None or edited:
            return None
        if self._differs(level, evaluation, self._evaluate(level, batch, random)):
            words = "two evaluations from one random state differ: the loss has a state of its own"
            self._add("not reproducible", level, words)
        return evaluation

    def _evaluate(self, level: Problem, batch: Any, random: RandomState) -> LossGradient:
        lower = self.oracle.lower
        self.oracle.passes.count(gradients=1)
        with replay(random):  # gradient_above differentiates F through all lower levels
            if level is lower:
                evaluation = lower.gradient(batch, self._variables)
            else:
                evaluation = lower.gradient_above(level, batch, self._variables)
        self.oracle.buffers.restore()
        return evaluation

    def _differs(self, level: Problem, one: LossGradient, other: LossGradient) -> bool:
        """Whether two evaluations differ by more than rounding in another order of summation."""
        a, b = (Vector.of(e.gradient, self._variables) for e in (one, other))
        half = any(each.evaluated.half for each in level.levels)
        epsilon = torch.finfo(torch.bfloat16).eps if half else machine_epsilon(a)
        apart = abs(one.loss - other.loss) > 10 * epsilon * abs(one.loss)
        return apart or (a - b).norm() > 10 * epsilon * a.norm()

    def _unread(self, above: Sequence[Tensor | None], below: Sequence[Tensor | None]) -> None:
        """Add findings on variables without a gradient, and on a missing implicit term."""
        upper, lower = self.oracle.upper, self.oracle.lower
        count = len(upper.variables)
        by_prior = lower.evaluated.unread
        unread = [
            (lower, n) for n, g in zip(lower.names, below[count:]) if g is None or n in by_prior
        ]
        unread += [
            (upper, n)
            for n, f, g in zip(upper.names, above, below)
            if (f is None or n in upper.evaluated.unread) and g is None
        ]
        for level, name in unread:
            losses = "the lower loss does not read" if level is lower else "no loss reads"
            self._add("unread variable", level, f"{losses} the variable {name!r}")
        if not any(g is not None and g.any() for g in above[count:]):
            words = "∂F/∂w is zero: the upper loss does not depend on the lower variables here"
            self._add("no implicit term", upper, words)
        if all(g is None for g in below[:count]):
            self._no_mixed()
        of_f, of_upper = (Vector.of(g[:count], upper.variables).norm() for g in (below, above))
        self.envelope = of_f / of_upper if of_upper else math.inf

    def _no_mixed(self) -> None:
        words = "∂²f/∂u∂w is zero here: the upper variables do not move the lower minimum"
        self._add("no mixed derivative", self.oracle.lower, words)

    def _second_order(self, product: ProductKind) -> None:
        lower = self.oracle.lower
        try:
            self.curvature = curvature = measure_curvature(
                self.oracle, product, self.solver_steps, self.seed
            )
        except NonFiniteError as error:
            advice = "look for roots, norms and logarithms of zero, whose derivatives are infinite"
            self._add("not finite", lower, str(error), advice)
            return
        except ProblemError as error:
            words, _, advice = str(error).rpartition("; ")
            exact = product == "exact"
            self._add("no double backward" if exact else "bad loss", lower, words, advice)
            if exact:
                self._second_order("difference")
            return
        kinds = {finding.kind for finding in self.findings}
        if not curvature.implicit and not kinds & {"no mixed derivative", "no implicit term"}:
            self._no_mixed()
        damping = f"damping={curvature.damping():.2g}"
        if curvature.smallest < -1e-3 * abs(curvature.largest):
            words = f"the lower Hessian has negative curvature, {curvature.smallest:.2g}"
            more = f"take more lower steps, or give cg, minres or warm {damping}"
            self._add("negative curvature", lower, words, f"this is no minimum: {more}")
        if (residual := curvature.residual) > 0.1:
            words = f"{self.solver_steps} steps of minres leave a residual of {residual:.2g}"
            advice = f"give the solver more steps or {damping}, or regularise the lower loss"
            self._add("ill-conditioned", lower, words, advice)
        if curvature.change > 0.1:
            before, after = curvature.losses
            words = (
                f"the lower level is far from its minimum: a Newton step takes its loss from "
                f"{before:.4g} to {after:.4g} and changes the hypergradient by "
                f"{curvature.change:.0%}"
            )
            self._add("far from stationary", lower, words)
        absorbed = False
        with suppress(NonFiniteError):  # which the next measurement names
            absorbed = curvature.change <= 0.1 and self._absorbed(product, curvature)
        self._noise(product, curvature, absorbed)

    def _absorbed(self, product: ProductKind, curvature: Curvature) -> bool:
        """Add a finding if the terms cancel for every upper batch and f is nearly flat in u."""
        most, slack = curvature.remainder, CANCELS + min(curvature.residual, CANCELS)
        if not (most < slack and self.envelope < CANCELS):
            return False
        solver, several = MINRES(steps=self.solver_steps, product=product), False
        first = self.oracle.upper_gradient.b
        for above, _ in self.pairs:  # on one batch the terms may cancel at its own minimum
            oracle = replace(self.oracle, upper_batch=above)
            if (oracle.upper_gradient.b - first).norm() > 0:
                several = True
            estimate = solver.estimate(oracle)
            most = max(most, estimate.hypergradient.norm() / (estimate.direct.norm() or 1.0))
        if most < slack:
            words = (
                f"the implicit term leaves {most:.2%} of the direct one, and ∂f/∂u is nearly zero: "
                "at the lower minimum F hardly depends on the upper variables, and they move by "
                "the path to it or the decay of an optimizer"
            )
            unless = "" if several else " (unless they are at F's minimum: one batch cannot tell)"
            self._add("absorbed", self.oracle.upper, words + unless)
        return most < slack

    def _noise(self, product: ProductKind, curvature: Curvature, zero: bool) -> None:
        """Measure the signal-to-noise ratio; add a finding if it is below 1, unless ``zero``."""
        solver = MINRES(
            steps=self.solver_steps, damping=curvature.damping(), product=product, tolerance=1e-2
        )
        devices, signal = devices_of(self.oracle.upper, self.oracle.lower), SignalToNoise()
        try:
            for number, (above, below) in enumerate(self.pairs):
                oracle = replace(
                    self.oracle,
                    upper_batch=above,
                    lower_batch=below,
                    upper_random=RandomState.seeded(devices, self.seed, "upper", number),
                    lower_random=RandomState.seeded(devices, self.seed, "lower", number),
                )
                signal.add(solver.estimate(oracle).hypergradient)
        except NonFiniteError as error:
            words = f"on pair {number + 1} of {len(self.pairs)} of batches: {error}"
            advice = "look for rows with values that are NaN or that overflow"
            self._add("not finite", self.oracle.upper, words, advice)
            return
        self.signal_to_noise = ratio = signal.read()
        if ratio is not None and ratio < 1 and not zero:
            words = (
                f"the hypergradient is noise: over {len(self.pairs)} pairs of batches its "
                f"signal-to-noise ratio is {ratio:.2g}"
            )
            self._add("noisy hypergradient", self.oracle.upper, words)
