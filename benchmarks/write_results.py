"""Writes benchmarks/README.md and its figure from the JSON files in benchmarks/results.

python benchmarks/write_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from measure import table

HERE = Path(__file__).parent
SCRIPTS = ("dora_layer", "step_cost", "estimators", "fidelity", "scaling")
INTRODUCTION = """# Benchmarks

What the library's claims rest on. Each script prints its tables and, with `--json FILE`, writes
them with versions, machine and targets; each takes under 10 minutes, and under one with `--quick`.
All that is compared runs interleaved in one process; times are medians, ratios are medians of the
ratios within each round. Other libraries are measured where they are installed:

```sh
pip install -e ".[dev]"
pip install --no-deps --ignore-requires-python betty-ml==0.2.1  # a peer, no dependency
for name in dora_layer step_cost estimators fidelity scaling; do
    python benchmarks/$name.py --json benchmarks/results/$name.json
done
python benchmarks/write_results.py  # this file and its figure
```

`python benchmarks/estimator_table.py --write README.md` writes the main README's table.
"""


READING: dict[str, str] = {}


def main() -> None:
    """Read the results, write the page and the figure."""
    results = {
        name: json.loads((HERE / "results" / f"{name}.json").read_text()) for name in SCRIPTS
    }
    targets = [target for result in results.values() for target in result["targets"]]
    parts = [INTRODUCTION, _machine(results["estimators"]), f"## Targets\n\n{table(targets)}\n"]
    parts.append("![Cost and error of estimators; cost of a bilevel step](cost.png)\n")
    for name, result in results.items():
        parts.append(f"## `{name}.py`\n\n{READING[name]}\n")
        parts += [f"**{title}**\n\n{table(rows)}\n" for title, rows in result["tables"].items()]
    (HERE / "README.md").write_text("\n".join(parts))
    figure(results)


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    return (
        f"Measured on {machine['cores']} shared cores of a virtual machine "
        f"({machine['processor']}), "
        f"{machine['threads']} threads, no GPU, Python {machine['python']}; {versions}.\n"
    )


def figure(results: dict[str, Any]) -> None:
    """Left: cost and error of the estimators. Right: what a bilevel step costs."""
    canvas, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for row in results["estimators"]["tables"]["Cost and error"]:
        if row["error on B"] is not None:
            left.scatter(row["G"], row["error on B"], color="tab:blue")
            left.annotate(
                row["estimator"],
                (row["G"], row["error on B"]),
                fontsize=8,
                xytext=(4, 4),
                textcoords="offset points",
            )
    left.set(
        xscale="log",
        yscale="log",
        xlabel="one iteration, forward+backward passes",
        ylabel="relative error on problem B",
        title="Estimators: cost and error",
    )
    rows = results["step_cost"]["tables"]["One and four lower steps"]
    bars = [row for row in rows if row["lower steps"] in (1, 4)]
    labels = [
        f"DoRA step\n{row['layer']} layer"
        if row["estimator"].startswith("none")
        else f"BiDoRA, {row['lower steps']} lower\n{row['layer']} layer"
        for row in bars
    ]
    colours = ["tab:blue" if row["layer"] == "fast" else "tab:grey" for row in bars]
    right.barh(labels[::-1], [row["per lower step"] for row in bars][::-1], color=colours[::-1])
    right.axvline(1, color="black", linewidth=0.8)
    right.set(
        xlabel="time per lower step ÷ PEFT DoRA step", title="MiniLM, all linear, 32×64 tokens"
    )
    right.tick_params(axis="y", labelsize=8)
    canvas.savefig(HERE / "cost.png", dpi=120)


if __name__ == "__main__":
    main()
