"""The README's table of estimators, measured on two reference problems.

    python benchmarks/estimator_table.py                      # print it
    python benchmarks/estimator_table.py --write README.md    # replace it between its marks

Both problems are at the minimum of their lower level and in float64, so the numbers are the
estimators' own errors and the same on every machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from hyperopt_peft import compare_hypergradients, minimise
from hyperopt_peft.hypergradients import get_estimator, registered
from hyperopt_peft.problems import hypercleaning, logistic

METHODS = [
    "direct",
    "darts:scale=1.0",
    "darts:scale=lr",
    "unrolled:steps=10",
    "neumann:terms=20",
    "cg:steps=10",
    "minres:steps=10",
    "cg:steps=10,product=difference",
    "exact",
]
BEGIN, END = "<!-- estimator table -->", "<!-- end of estimator table -->"


def table() -> str:
    """The Markdown table."""
    levels = [logistic.breast_cancer(), hypercleaning.digits()]
    comparisons = []
    for upper, lower in levels:
        minimise(lower)
        comparisons.append(compare_hypergradients(upper, lower, METHODS, repeats=1))
    lines = [
        "| estimator | kind | A: error | A: cosine | B: error | B: cosine | passes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, a, b in zip(METHODS, *(c.rows for c in comparisons), strict=True):
        kind = registered()[get_estimator(method).name].kind
        cells = [f"{row.relative_error:.2g}" for row in (a, b)]
        cosines = ["–" if row.norm_ratio == 0 else f"{row.cosine:.4f}" for row in (a, b)]
        cost = f"{a.gradients} + {a.products}" if method != "exact" else "2 + n + 1"
        numbers = [cells[0], cosines[0], cells[1], cosines[1]]
        lines.append(f"| `{method}` | {kind} | {' | '.join(numbers)} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it into a file."""
    parser = argparse.ArgumentParser(description="the table of estimators, measured")
    parser.add_argument("--write", type=Path, help="a file with the table's two marks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    markdown = table()
    if arguments.write is None:
        print(markdown)
        return
    before, begin, rest = arguments.write.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{arguments.write} lacks the marks {BEGIN} and {END}")
    arguments.write.write_text(f"{before}{BEGIN}\n{markdown}\n{END}{after}")


if __name__ == "__main__":
    main()
