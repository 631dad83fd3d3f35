"""Is the hypergradient right under dropout and in half precision?

    python benchmarks/estimators fidelity --json fidelity.json

MiniLM with DoRA on query and value as in BiDoRA: the upper level has the magnitudes, the lower one
A, B and head. The implicit term of ``darts`` and that of Betty (the hypergradient minus ∂F/∂u,
which would hide the error) are compared with the exact mixed product, ``darts:product=exact``, in
float32 with the same dropout masks.

All methods start from the same ∂F/∂w with the same masks, so that only the product is judged. In
bfloat16 (autocast) ∂F/∂w itself is rounded; the row ``darts:product=exact`` has no other error.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.estimators.peers import BETTY, betty_term
from benchmarks.measure import arguments, report
from benchmarks.minilm import batches, minilm
from hyperopt_peft import Problem, hypergradient
from hyperopt_peft.adapters import split_parameters
from hyperopt_peft.hypergradients import Vector, dot, open_oracle
from hyperopt_peft.utils.restore import perturbed

EXACT = "darts:product=exact"
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


def of_betty(upper: Problem, lower: Problem, seed: int) -> Vector:
    """Betty's ``darts`` with its default epsilon, from ∂F/∂w with the seed's masks.

    Betty's passes draw new masks, from a generator that the seed determines too.
    """
    with open_oracle(upper, lower, seed=seed).open() as oracle:
        b = oracle.upper_gradient.b
        torch.manual_seed(seed)
        with perturbed(lower.variables):
            return betty_term("darts", upper, lower, b.parts)


METHODS = {name: implicit(name) for name in ("darts", EXACT)} | ({BETTY: of_betty} if BETTY else {})


def measure(dropout: float, draws: int) -> list[Row]:
    """Run all methods in both precisions with one dropout."""
    model = minilm("fast full", dropout=dropout, targets=["query", "value"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # attention reads its own module's p
            module.p = dropout
    exact: list[Vector] = []
    rows: list[Row] = []
    for precision in ("fp32", "bf16"):
        upper, lower = levels(model, autocast=precision == "bf16")
        exact = exact or [METHODS[EXACT](upper, lower, seed) for seed in range(draws)]
        for name, method in METHODS.items():
            if name == EXACT and precision == "fp32":
                continue  # the reference itself
            pairs = [(method(upper, lower, seed), t) for seed, t in enumerate(exact)]
            row: Row = {"precision": precision, "dropout": dropout, "method": name}
            row["cosine"] = statistics.median(dot(h, t) / (h.norm() * t.norm()) for h, t in pairs)
            row["relative error"] = statistics.median((h - t).norm() / t.norm() for h, t in pairs)
            rows.append(row)
    return rows


def main() -> None:
    """Measure and print; write JSON if asked to."""
    options = arguments("the implicit term against the exact one, under dropout and in bfloat16")
    if options.device != "cpu":  # a GPU draws other masks for another dtype or attention kernel
        raise SystemExit("fidelity.py compares precisions mask by mask, which needs --device cpu")
    draws = 3 if options.quick else 20
    rows = [row for dropout in (0.0, 0.1) for row in measure(dropout, draws)]
    report(options, {f"Implicit term, {draws} draws of masks": rows})
