"""Writes benchmarks/README.md, its figure and tables of docs from the files in benchmarks/results.

python benchmarks/write_results.py
python benchmarks/write_results.py --print noise  # the tables of results/noise.json instead
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter
from measure import table

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/attribution.md"
BEGIN, END = "<!-- attribution table -->", "<!-- end of attribution table -->"
INTRODUCTION = """# Benchmarks

The measurements behind the library's claims. All that is compared runs interleaved in one process;
times are medians, ratios are medians of the ratios within each round. A script prints its tables
and takes under 10 minutes, or under one with `--quick`; `--json FILE` writes tables, targets,
versions and machine.

```sh
pip install -e ".[dev]"
pip install --no-deps --ignore-requires-python betty-ml==0.2.1  # for the rows of Betty
for name in SCRIPTS; do
    python benchmarks/$name.py --json benchmarks/results/$name.json
done
python benchmarks/write_results.py                # writes this page and its figure
python benchmarks/write_results.py --print noise  # prints all tables of results/noise.json
```
"""
OTHERS = """\
`comparison.py` and `convergence.py` compare the estimators: [their page](../docs/comparison.md).
`bidora_estimators.py` asks which estimator BiDoRA needs: [figures](../docs/methods.md#bidora).
`rank_selection.py` asks whether searched ranks help: [figures](../docs/methods.md#rank-selection).
`attribution.py` asks what scores of training rows predict, cost and find:
[tables](../docs/attribution.md). It takes some one and a half hours of one core (`--parts` chooses)
and goes on where it was interrupted; its optional peers: `pip install cleanlab kronfluence`.
[`benchopt`](benchopt) has a solver for benchopt's bilevel benchmark.
"""

#: The question that a script answers, and its answer. The scripts' order is the page's.
QUESTIONS = {
    "dora_layer": (
        "Is the fast DoRA layer as quick as LoRA?",
        """\
Yes: 0.64 of PEFT's DoRA in time where LoRA takes 0.61, and half the time at 4096² with 256 tokens.
With dropout in the adapter the ratio is 0.84, since W0 is applied to two inputs. A single small
layer with few tokens is no faster than PEFT's. In float64 the two layers agree to rounding; in
bfloat16 the fast one is closer to the float64 result.""",
    ),
    "step_cost": (
        "What does a step of BiDoRA cost?",
        """\
Three passes with `darts:scheme=forward`: the lower one, the upper one, and one along the
difference, with respect to the magnitudes alone. Four lower steps an upper step share the last
two. The extra memory is three adapters; an exact product holds the graph of a double backward,
some 90 adapters.""",
    ),
    "estimators": (
        "What does an iteration of the Engine cost, in forward+backward passes of a small MLP?",
        """\
1.95 with `direct`, 2.7 with `darts:scheme=forward` (Betty's two-sided one: 2.9), 10.6 with
`neumann` of five terms, 12.5 with `cg` of five steps. The solvers are damped so that they take all
their steps. The errors are those at the lower minimum of problems A and B.""",
    ),
    "fidelity": (
        "Is the implicit term right under dropout and in bfloat16?",
        """\
Yes where all passes see one mask: its error is that of rounding at any dropout. With a mask of its
own for each pass (Betty) the cosine is 0.06 at dropout 0.05 and 0.02 at 0.1. Under autocast the
difference runs in float32; the error left is that of ∂F/∂w.""",
    ),
    "scaling": (
        "How does the cost grow with rank, adapted modules and length?",
        """\
In time, three passes whatever they are; in memory, about three adapters beyond a plain step. A step
of `cg` costs about 1.2 plain steps, and no memory beyond that of the first.""",
    ),
    "faults": (
        "Does a run survive SIGKILL, damaged files, full disks and NaN?",
        """\
Yes: a killed run resumes bit for bit, and each damaged checkpoint is one error. A run that was
killed before its first whole checkpoint begins anew. A loss of power is not tested, but the hashes
notice a file that did not reach the disk. A full disk is a limit on the size of files here. Not
tested: several processes, GPUs, collators that draw random numbers.""",
    ),
    "noise": (
        "What do minibatches do to an estimator?",
        """\
A solver that starts anew on each batch inverts that batch's Hessian, and its bias does not average
out: 0.34 for `cg`. `warm` averages over the batches: 0.05. Table and advice are in
[the mathematics](../docs/mathematics.md#minibatches).""",
    ),
}
#: Why a target is missed, by how its name begins.
REASONS = {
    "DoRA layer, kept activations ÷ PEFT, whole MiniLM": """\
0.40 is the frozen model's own, and LoRA has 0.57. A layer's output y is held also where nothing
else holds it: before a residual's dropout, and before attention with dropout, which holds scaled
copies of queries and keys. The adapted layers alone hold 0.49.""",
    "DoRA layer, time ÷ PEFT, MiniLM, freed memory": """\
In a process that does not return freed memory to the system, PEFT's layer pays for no page faults.
The frozen model without an adapter takes 0.74 there, so that no DoRA layer can take 0.65.""",
    "BiDoRA step ÷ PEFT DoRA step": """\
Three passes cost 1 + 0.99 + 0.93 DoRA steps with PEFT's layer. The fast layer brings each down to
LoRA's price. The three passes of the frozen model alone take 2.2 PEFT steps where memory is not
returned.""",
    "4 lower steps an upper step": """\
The upper and the directional pass run here on batches as large as the lower level's.""",
    "upper iteration on the MLP": """\
`direct` takes 1.95, which leaves 0.35 of a pass for the third one. On tensors this small an
optimizer step, a norm, a copy and the check for NaN cost as much as a pass.""",
}


def main() -> None:
    """Write the page and the figure, or print the tables of one script."""
    parser = argparse.ArgumentParser(description="this folder's README from the results")
    parser.add_argument(
        "--print", choices=[*QUESTIONS, "attribution"], help="print this script's tables instead"
    )
    name = parser.parse_args().print
    if name is not None:
        for title, rows in _read(name)["tables"].items():
            print(f"\n{title}\n\n{table(rows)}")
        return
    results = {name: _read(name) for name in QUESTIONS}
    attributed = _read("attribution")
    every = [*results.values(), attributed]
    targets = [target for result in every for target in result["targets"]]
    met = [target for target in targets if target["met"]]
    missed = [target for target in targets if not target["met"]]
    begin, end = INTRODUCTION.split("SCRIPTS")
    parts = [begin + " ".join(QUESTIONS) + end, _machine(results["estimators"])]
    parts.append("![Cost and error of estimators; cost of a bilevel step](cost.png)\n")
    parts.append(f"## Targets that are missed\n\n{_numbers(missed)}\n\n{_reasons(missed)}\n")
    parts.append(f"## Targets that are met\n\n{_numbers(met)}\n\n## Scripts\n")
    for name, (question, answer) in QUESTIONS.items():
        files = f"[`{name}.py`]({name}.py), [its tables](results/{name}.json)"
        parts.append(f"**{question}** ({files})\n{answer}\n")
    (HERE / "README.md").write_text("\n".join([*parts, OTHERS]))
    figure(results)
    PAGE.write_text(between(PAGE.read_text(), attribution(attributed)))


def between(page: str, text: str) -> str:
    """``page`` with ``text`` between the marks of the attribution's tables."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}"


def attribution(result: dict[str, Any]) -> str:
    """The tables of attribution.py, for its page."""
    parts = [f"**{title}**\n\n{table(rows)}\n" for title, rows in result["tables"].items()]
    return "\n".join([*parts, _machine(result)])


def _read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return result


def _numbers(targets: Sequence[dict[str, Any]]) -> str:
    return table([{key: target[key] for key in ("name", "value", "target")} for target in targets])


def _reasons(missed: Sequence[dict[str, Any]]) -> str:
    """Why each of ``missed`` is missed; a target without a reason is left to its row."""
    names = [target["name"] for target in missed]
    return "\n".join(
        textwrap.indent(f"- *{begin}*. {why}", "  ").removeprefix("  ")
        for begin, why in REASONS.items()
        if any(name.startswith(begin) for name in names)
    )


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
                rotation=25 if "darts" in row["estimator"] else 0,
            )
    left.set(
        xscale="log",
        yscale="log",
        xlabel="one iteration, forward+backward passes",
        ylabel="relative error on problem B",
        title="Estimators: cost and error",
    )
    left.set_xlim(right=60)
    left.set_xticks([2, 3, 5, 10, 20, 50])
    left.xaxis.set_major_formatter(ScalarFormatter())
    left.xaxis.set_minor_formatter(NullFormatter())
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
