"""Every estimator on four problems: error, noise and cost.

    python benchmarks/estimators comparison --json benchmarks/results/comparison.json
    python benchmarks/estimators comparison --json FILE --methods cg:steps=10
    python benchmarks/estimators comparison --write benchmarks/results/comparison.json

The first command measures all estimators. The second measures some and replaces their rows in FILE.
The third measures nothing: it writes results/comparison.md and the tables of README.md and
docs/mathematics.md from FILE. The problems are in levels.py, other libraries in peers.py.

Errors are relative to the exact hypergradient at the same point (on BiDoRA: to a long MINRES
solve).
Minibatches have 64 rows of each level's data; noise.py explains the three columns.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.estimators import noise
from benchmarks.estimators.levels import METHODS, Levels, encoder_problem, small_problems
from benchmarks.estimators.peers import Peer, peers
from benchmarks.measure import arguments, report, table
from benchmarks.memory import peak_memory
from benchmarks.pages import DOCS, RESULTS, ROOT, between, machine_line
from hyperopt_peft import NonFiniteError, ProblemError, hypergradient
from hyperopt_peft.engine import minimize
from hyperopt_peft.hypergradients import Vector, dot, get_estimator, registered
from hyperopt_peft.hypergradients.estimate import check_estimator, open_oracle
from hyperopt_peft.hypergradients.products import Passes

REFERENCE = "minres:steps=200,tolerance=1e-6"
Row = dict[str, Any]


def found(method: str | Peer, levels: Levels, passes: Passes | None = None) -> Vector | str:
    """The hypergradient, or the short reason why there is none; ``passes`` counts its passes."""
    try:
        if not isinstance(method, str):
            return method(*levels)
        check_estimator(get_estimator(method), *levels)
        oracle = open_oracle(*levels, seed=0)
        oracle.passes = passes or oracle.passes
        return oracle.estimate(get_estimator(method)).hypergradient
    except (ProblemError, NonFiniteError) as error:
        return refusal(error)
    except (RuntimeError, ArithmeticError, AttributeError, TypeError) as error:
        return textwrap.shorten(f"fails: {error}", 50, placeholder=" …")


def refusal(error: Exception) -> str:
    """The first words of an estimator's refusal."""
    return "refused: " + re.split("[;,(]", str(error).split(": ", 1)[-1])[0]


def against(truth: Vector, result: Vector | str) -> Row:
    """Error and cosine of ``result``, or the reason why there is no result."""
    if isinstance(result, str):
        return {"error": result, "cosine": None}
    length = result.norm()
    cosine = dot(result, truth) / (length * truth.norm()) if length else None
    return {"error": (result - truth).norm() / truth.norm(), "cosine": cosine}


def small(methods: Mapping[str, str | Peer]) -> dict[str, Row]:
    """Errors and cosines on A, B and C."""
    rows: dict[str, Row] = {name: {} for name in methods}
    for key, levels in small_problems().items():
        truth = Vector(hypergradient(*levels, "exact"))
        for name, method in methods.items():
            result = against(truth, found(method, levels))
            rows[name] |= {f"{key}: {column}": value for column, value in result.items()}
    return rows


def noisy(methods: Mapping[str, str | Peer], draws: int) -> dict[str, Row]:
    """Error, bias and spread of the estimates on B over minibatches; see noise.py."""
    upper, lower = noise.levels()
    minimize(lower)
    result: dict[str, Row] = {}
    for name in methods:
        if name not in METHODS:
            continue
        try:
            row = noise.noise(name, upper, lower, draws, settle=250)
        except ProblemError as error:
            row = {"error": refusal(error)}
        result[name] = {f"B, batch 64: {c}": row.get(c) for c in ("error", "bias", "spread")}
    return {name: result.get(name, {}) for name in methods}


def encoder(levels: Levels, methods: Mapping[str, str | Peer], truth: Vector) -> dict[str, Row]:
    """Error, cosine, passes, milliseconds of processor time and memory on MiniLM-BiDoRA."""
    rows = {}
    for name, method in methods.items():
        passes = Passes()
        seconds = []
        while len(seconds) < 3 and sum(seconds) < 5:
            begin = time.process_time()
            result = found(method, levels, None if seconds else passes)
            seconds.append(time.process_time() - begin)
        row = {f"BiDoRA: {k}": v for k, v in against(truth, result).items()}
        rows[name] = row
        if not isinstance(result, str):
            row["ms"] = 1e3 * statistics.median(seconds)
            row["passes"] = f"{passes.gradients} + {passes.products}" if name in METHODS else None
            peak = peak_memory(lambda m=method: found(m, levels), torch.device("cpu"))
            row["MB"] = peak / 2**20
    return rows


def measured(quick: bool, names: Sequence[str]) -> tuple[list[Row], Row]:
    """The rows of the methods ``names``, and facts about the problems."""
    others, missing = peers()
    methods: dict[str, str | Peer] = {name: others.get(name, name) for name in names}
    parts = [small(methods), noisy(methods, 5 if quick else 100)]
    levels, norm = encoder_problem(steps=5 if quick else 300)
    oracle = open_oracle(*levels)
    reference = oracle.estimate(get_estimator("minres:steps=5" if quick else REFERENCE))
    parts.append(encoder(levels, methods, reference.hypergradient))
    rows = []
    for name in methods:
        row: Row = {"estimator": name}
        row["kind"] = registered()[get_estimator(name).name].kind if name in METHODS else "peer"
        for part in parts:
            row |= part[name]
        rows.append(row)
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows], {
        "missing peers": missing,
        "BiDoRA: lower gradient norm": norm,
        "BiDoRA: reference": f"{REFERENCE}, residual {reference.residual:.1e}",
    }


def merged(measured: list[Row], new: list[Row]) -> list[Row]:
    """The rows of both; ``new`` rows replace old ones of the same name, and peers come last."""
    rows = {row["estimator"]: row for row in (*measured, *new)}
    ours = [rows.pop(name) for name in METHODS if name in rows]
    return [*ours, *rows.values()]


SECTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "Right at the lower minimum": (
        "A, B, C: relative error to the exact hypergradient; there every estimator of this library "
        "but `direct` has a cosine above .9. BiDoRA: error and cosine to a long solve, at a point "
        "close to the minimum.",
        {
            **{f"{p}: error": p for p in "ABC"},
            "BiDoRA: error": "BiDoRA",
            "BiDoRA: cosine": "cosine",
        },
    ),
    "Minibatches and cost": (
        "Minibatches: 100 batches of 64 rows of each level's data on B (after 250 upper steps, "
        "if an estimator has a state): the error of one estimate, the error of their mean (bias) "
        "and their standard deviation (spread), on the images of each batch. Cost of one "
        "hypergradient on MiniLM: forward+backward passes + second backward passes, milliseconds "
        "of processor time, and additional memory.",
        {
            **{f"B, batch 64: {c}": c for c in ("error", "bias", "spread")},
            **{c: c for c in ("passes", "ms", "MB")},
        },
    ),
}
# The formula of each estimator, with a reference of docs/mathematics.md, and when to use it.
USE = {
    "direct": ("∂F/∂u", "F depends on u itself, and time is short"),
    "darts:xi=1.0": (
        "v = ξ·b [6]",
        "the model is large; for weights of rows or sources with `product=dots`",
    ),
    "fastmix": ("`darts` with the output layer's weight in place of w [20]", "as `darts`, cheaper"),
    "sama": (
        "v = Db, D = −(∂w'/∂g)ᵀ for the last lower optimizer step g ↦ w' [14]",
        "as `darts`, with Adam at the lower level",
    ),
    "unrolled:steps=10": (
        "reverse mode through the last K optimizer steps [7, 8]",
        "w is far from its minimum",
    ),
    "neumann:terms=20": ("v = η Σ (I − ηH)ᵏ b, k = 0 … K [5]", "you repeat a paper that uses it"),
    "cg:steps=10": (
        "Krylov space; H positive definite [2, 3]",
        "w is near its minimum, and f is convex there",
    ),
    "cg:steps=10,product=difference": (
        "as `cg`, with first-order passes only [9]",
        "as `cg`, and the loss has no second derivative, as with fused attention",
    ),
    "minres:steps=10": (
        "Krylov space; H may be indefinite [4]",
        "as `cg`, and curvature may be negative, as in a network; the default",
    ),
    "nystrom:rank=10,steps=10": (
        "`cg` preconditioned by (HΩ)(ΩᵀHΩ)⁻¹(HΩ)ᵀ, Ω with `rank` random columns [15]",
        "a few eigenvalues of H are far larger than the others",
    ),
    "warm": (
        "v ← v − a(Hv − b), continued from the last upper step [12, 13]",
        "batches are small, and upper steps are many",
    ),
    "f2sa": (
        "∂F/∂u + λ[∂f/∂u at y − ∂f/∂u at w], y descends f + F/λ from the last upper step's [16–18]",
        "as `warm`, and the loss has no second derivative",
    ),
    "exact": ("dense solve in float64, n products", "as a reference, up to 5,000 lower unknowns"),
}
# The README's rows: when not to use them.
AVOID = {
    "direct": "F does not read u: the estimate is 0",
    "darts:xi=1.0": "errors matter: the implicit term is proportional to ξ and to the scale of f",
    "unrolled:steps=10": "memory is short: it keeps every step; a Trainer keeps one",
    "cg:steps=10": "curvature is negative: it stops early; use `minres`, or add `damping`",
    "cg:steps=10,product=difference": "the model has no room for passes in float32",
    "minres:steps=10": "the loss has no second derivative: add `product=difference`",
    "warm": "u moves fast, or there is only one upper step",
}


def _columns(rows: list[Row], columns: Mapping[str, str]) -> str:
    """A table of some columns, renamed; rows without a value are left out."""
    named = [
        row | {"estimator": row["estimator"] if row["kind"] == "peer" else f"`{row['estimator']}`"}
        for row in rows
        if any(row.get(key) is not None for key in columns)
    ]
    heads = {"estimator": "estimator", **columns}
    return table([{head: row.get(key) for key, head in heads.items()} for row in named])


def _short(row: Row) -> Row:
    """A row whose refusals and failures are one word."""
    words = ("refused", "fails")
    return {
        key: next((w for w in words if str(value).startswith(w)), value)
        for key, value in row.items()
    }


def estimator_table(rows: list[Row]) -> str:
    """The table of docs/mathematics.md: formulas, when to use them, and errors."""
    errors = _errors(rows)
    return table(
        [
            {
                "estimator": f"`{n}`",
                "v, or the estimate": v,
                "use it when": when,
                "error": errors[n],
            }
            for n, (v, when) in USE.items()
        ]
    )


def short_table(rows: list[Row]) -> str:
    """The README's table: a few estimators, with passes of one lower and one upper step."""
    errors = _errors(rows)
    return table(
        [
            {
                "estimator": f"`{name}`",
                "use it when": USE[name][1],
                "do not use it when": avoid,
                "passes": get_estimator(name).cost(),
                "error": errors[name],
            }
            for name, avoid in AVOID.items()
        ]
    )


def _errors(rows: list[Row]) -> dict[str, str]:
    """The errors on B, in percent; a dash where an estimator was not measured or refused."""
    errors = {row["estimator"]: row["B: error"] for row in rows}
    numbers = {name: errors.get(name) for name in USE}
    return {
        name: f"{float(f'{100 * error:.2g}'):g} %" if isinstance(error, float) else "–"
        for name, error in numbers.items()
    }


def page_table(content: Row) -> str:
    """The tables of results/comparison.md, from a file of measurements."""
    (rows,), details = content["tables"].values(), content["details"]
    # The page itself explains the faults of other libraries' estimators, named after a colon.
    rows = [
        row | {"estimator": row["estimator"].partition(":")[0]}
        if row["estimator"].startswith("Betty")
        else row
        for row in map(_short, rows)
    ]
    words = "\n\n".join(
        f"## {title}\n\n{text}\n\n{_columns(rows, columns)}"
        for title, (text, columns) in SECTIONS.items()
    )
    return (
        f"{words}\n\nBiDoRA's reference: {details['BiDoRA: reference']}; ‖∂f/∂w‖ = "
        f"{details['BiDoRA: lower gradient norm']:.1e}. {machine_line(content)}"
    )


def write_pages(file: Path) -> None:
    """Write the tables of all three pages."""
    content = json.loads(file.read_text())
    (rows,) = content["tables"].values()
    texts = {RESULTS / "comparison.md": page_table(content), ROOT / "README.md": short_table(rows)}
    texts |= {DOCS / "mathematics.md": estimator_table(rows)}
    for path, text in texts.items():
        path.write_text(between(path.read_text(), text, "estimator"))


def main() -> None:
    """Measure and report, or write the pages from a file of measurements."""
    if sys.argv[1:2] == ["--write"]:
        write_pages(Path(sys.argv[2]))
        return
    everything = [*METHODS, *peers()[0]]
    options = arguments("every estimator on four problems", methods=everything)
    rows, details = measured(options.quick, options.methods)
    if options.methods == everything or options.json is None:
        report(options, {"Estimators": rows}, details)
        return
    print(table(rows))
    content = json.loads(options.json.read_text())
    content["tables"]["Estimators"] = merged(content["tables"]["Estimators"], rows)
    options.json.write_text(json.dumps(content, indent=1) + "\n")
