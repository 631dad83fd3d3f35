"""Is the hypergradient right under dropout and in half precision?

    python benchmarks/estimators fidelity --json fidelity.json

MiniLM with DoRA on query and value as in BiDoRA: the upper level has the magnitudes, the lower one
A, B and head. Each estimator's implicit term (the hypergradient minus ∂F/∂u, which would hide the
error) is compared with the exact mixed product, ``darts:product=exact``, in float32 with the same
dropout masks.

All estimators start from the same ∂F/∂w with the same masks, so that only the product is judged.
In bfloat16 (autocast) ∂F/∂w itself is rounded; the row ``darts:product=exact`` has no other error.

A spread is the standard deviation over the draws of masks, in units of the norm of the mean of the
exact terms. (In units of its own mean, pure noise would have a spread of √n.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Target, arguments, report
from benchmarks.minilm import batches, minilm
from hyperopt_peft import Problem, hypergradient
from hyperopt_peft.adapters import split_parameters
from hyperopt_peft.hypergradients import Vector, dot, open_oracle
from hyperopt_peft.hypergradients.products import default_epsilon
from hyperopt_peft.utils.restore import assign_, perturbed

try:
    from betty.hypergradient import jvp_fn_mapping

    BETTY = f"Betty {version('betty-ml')}"
except ImportError:
    BETTY = ""

INSTALL_BETTY = "pip install --no-deps --ignore-requires-python betty-ml==0.2.1"
EXACT, TWO_SIDED, ONE_SIDED = "darts:product=exact", "darts", "darts:scheme=forward"
Row = dict[str, Any]
Method = Callable[[Problem, Problem, int], Vector]


class Level(Problem):
    """The model's loss over some of its parameters; in bfloat16 with ``autocast``."""

    def __init__(self, model: Any, variables: Any, batch: Any, *, autocast: bool) -> None:
        self.model, self.autocast = model, autocast
        super().__init__(variables.items(), data=[batch])

    def loss(self, batch: Any) -> Tensor:
        """The task loss, with dropout."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.model(**batch).loss
        return loss


def levels(model: Any, *, autocast: bool) -> tuple[Problem, Problem]:
    """Upper and lower level of BiDoRA on two batches of 8 × 16 tokens."""
    parts = split_parameters(model)
    above, below = batches(2, 8, 16)
    return (
        Level(model, parts.magnitudes, above, autocast=autocast),
        Level(model, parts.directions | parts.rest, below, autocast=autocast),
    )


def implicit(method: str) -> Method:
    """The implicit term by an estimator of this library; all passes have the seed's masks."""

    def run(upper: Problem, lower: Problem, seed: int) -> Vector:
        total = Vector(hypergradient(upper, lower, method, seed=seed))
        return total - Vector(hypergradient(upper, lower, "direct", seed=seed))

    return run


@contextmanager
def lower_point(
    upper: Problem, lower: Problem, seed: int
) -> Iterator[tuple[Sequence[Tensor], Vector]]:
    """w and ∂F/∂w with the masks of `implicit` for this seed; the body may move w.

    Passes in the body draw new masks, from a generator that the seed determines too.
    """
    with open_oracle(upper, lower, seed=seed).open() as oracle:
        b = oracle.upper_gradient.b
        torch.manual_seed(seed)
        with perturbed(lower.variables) as point:
            yield point, b


def independent_masks(upper: Problem, lower: Problem, seed: int) -> Vector:
    """The two-sided difference of ``darts`` as a plain loop: each pass has new dropout masks."""
    with lower_point(upper, lower, seed) as (point, b):
        epsilon = float(default_epsilon(point))
        sides = []
        for sign in (1, -1):
            assign_(lower.variables, point, b.parts, sign * epsilon / b.norm())
            gradient = lower.gradient(lower.peek_batch(), upper.variables).gradient
            sides.append(Vector.of(gradient, upper.variables))
        return (sides[1] - sides[0]) * (b.norm() / (2 * epsilon))


def of_betty(upper: Problem, lower: Problem, seed: int) -> Vector:
    """Betty's ``darts`` with its default epsilon: also two-sided, and with H⁻¹ = I."""
    with lower_point(upper, lower, seed) as (_, b):
        below = SimpleNamespace(
            meta_trainable_parameters=lambda: lower.variables,
            training_step_exec=lambda batch: lower.evaluate(batch)[0],
            cur_batch=lower.peek_batch(),
            config=SimpleNamespace(darts_alpha=0.01, darts_multitask=False),
            _strategy="default",
        )
        above = SimpleNamespace(trainable_parameters=lambda: upper.variables)
        return Vector(jvp_fn_mapping["darts"](b.parts, below, above, False))


METHODS: dict[str, Method] = {name: implicit(name) for name in (TWO_SIDED, ONE_SIDED, EXACT)}
METHODS["independent masks"] = independent_masks
if BETTY:
    METHODS[BETTY] = of_betty


def mean(estimates: Sequence[Vector]) -> Vector:
    """The mean over the draws of masks."""
    return sum(estimates[1:], start=estimates[0]) / len(estimates)


def deviation(estimates: Sequence[Vector]) -> float:
    """The standard deviation over the draws of masks, as a norm."""
    centre = mean(estimates)
    return math.sqrt(statistics.fmean((h - centre).norm() ** 2 for h in estimates))


def measure(dropout: float, draws: int) -> tuple[list[Row], list[Row]]:
    """Run all methods in both precisions with one dropout; return rows, and each draw's numbers."""
    model = minilm("fast full", dropout=dropout, targets=["query", "value"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # attention reads its own module's p
            module.p = dropout
    exact: list[Vector] = []
    rows: list[Row] = []
    details: list[Row] = []
    for precision in ("fp32", "bf16"):
        upper, lower = levels(model, autocast=precision == "bf16")
        exact = exact or [METHODS[EXACT](upper, lower, seed) for seed in range(draws)]
        unit = mean(exact).norm()
        for name, method in METHODS.items():
            if name == EXACT and precision == "fp32":
                continue  # the reference itself
            estimates = [method(upper, lower, seed) for seed in range(draws)]
            pairs = list(zip(estimates, exact, strict=True))
            cosines = [dot(h, t) / (h.norm() * t.norm()) for h, t in pairs]
            errors = [(h - t).norm() / t.norm() for h, t in pairs]
            row: Row = {"precision": precision, "dropout": dropout, "method": name}
            details.append(row | {"cosines": cosines, "relative errors": errors})
            row["cosine"] = statistics.median(cosines)
            row["relative error"] = statistics.median(errors)
            row["spread"] = deviation(estimates) / unit
            row["spread of the exact terms"] = deviation(exact) / unit
            rows.append(row)
    return rows, details


def main() -> None:
    """Measure and print; write JSON if asked to."""
    options = arguments("the implicit term against the exact one, under dropout and in bfloat16")
    if options.device != "cpu":  # a GPU draws other masks for another dtype or attention kernel
        raise SystemExit("fidelity.py compares precisions mask by mask, which needs --device cpu")
    draws = 3 if options.quick else 20
    rows, details = [], []
    for dropout in (0.0, 0.1) if options.quick else (0.0, 0.05, 0.1, 0.3):
        medians, numbers = measure(dropout, draws)
        rows += medians
        details += numbers
    rows.sort(key=lambda row: row["precision"], reverse=True)  # stable: fp32, then bf16
    cosine = {(row["precision"], row["dropout"], row["method"]): row["cosine"] for row in rows}
    title = "cosine to exact, fp32, dropout 0.1, MiniLM DoRA"
    targets = [
        Target(f"{title}, {name}", cosine["fp32", 0.1, name], 0.999, at_least=True)
        for name in (ONE_SIDED, TWO_SIDED)
    ]
    note = f"{BETTY} compared" if BETTY else f"no Betty to compare with; {INSTALL_BETTY}"
    print(note)
    tables = {f"Implicit term, {draws} draws of masks": rows}
    report(options, tables, targets, {"Betty": note, "draws": details})
