"""Writes benchmarks/README.md and its figure from the JSON files in benchmarks/results.

python benchmarks/write_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter
from measure import table

HERE = Path(__file__).parent
SCRIPTS = ("dora_layer", "step_cost", "estimators", "fidelity", "scaling", "faults", "noise")
INTRODUCTION = """# Benchmarks

What the library's claims rest on. Each script prints its tables and, with `--json FILE`, writes
them with versions, machine and targets; each takes under 10 minutes, and under one with `--quick`.
All that is compared runs interleaved in one process; times are medians, ratios are medians of the
ratios within each round. Other libraries are measured where they are installed:

```sh
pip install -e ".[dev]"
pip install --no-deps --ignore-requires-python betty-ml==0.2.1  # a peer, no dependency
for name in dora_layer step_cost estimators fidelity scaling faults noise; do
    python benchmarks/$name.py --json benchmarks/results/$name.json
done
python benchmarks/write_results.py  # this file and its figure
```

`comparison.py` and `convergence.py` compare the estimators themselves:
[docs/comparison.md](../docs/comparison.md). `rank_selection.py` asks whether searched ranks help.
"""


READING = {
    "dora_layer": """\
The fast layer takes LoRA's time; what that is in terms of PEFT's DoRA hangs on the allocator. By
default the C library gives the free top of its heap back to the system, or not, and then every
step pays about 2 µs for each 4 KiB page that it touches again. PEFT's layer, which touches most,
pays most, so LoRA itself was seen between 0.5 and 0.85 of PEFT's time from one process to the
next, and the fast layer between 0.60 and 0.73. The last rows are of a process that keeps its
memory: there the frozen model without an adapter takes about 0.74 of PEFT's time, so no DoRA
layer could take 0.65. On large layers with few tokens the gain is in the arithmetic: half the
time at 4096², 256 tokens. On a single small layer with few tokens, fixed costs make it no faster
than PEFT's.

With dropout in the adapter W0 is applied to two different inputs, forward and backward, which no
factoring avoids.

Kept activations: the layers themselves keep 0.49 of what PEFT's keep. The whole model keeps more
than 0.55, since 0.40 is the frozen model's own, and since a layer's output y is kept also where
nothing else keeps it: before a residual's dropout, and before attention with dropout, which keeps
scaled copies of queries and keys. LoRA, which has no need of y, keeps 0.57.

bfloat16: the fast layer is closer to the float64 result than PEFT's. In float64 they agree to
rounding.""",
    "step_cost": """\
A bilevel iteration with one-sided `darts` is three passes and nothing else: lower, upper, and one
along the difference, the last with respect to the magnitudes only. With PEFT's layer these come
to 1 + 0.99 + 0.93 DoRA steps. The fast layer brings each down to LoRA's price (see above), and a
further factor of 0.6 would have to come from the frozen model, whose own three passes take 2.2
PEFT steps where memory is kept. With four lower steps an upper step the third and the second pass
are shared by four. An exact product keeps the graph of a double backward, which is where the
memory goes.""",
    "estimators": """\
`direct` is two passes, so `darts:scheme=forward` at 2.3 would leave 0.3 of a pass for its third.
The rest is the cost of small tensors: an optimizer step, the norm, the copy and the check for NaN
at each level; the plain loop without any of them, which is two-sided, shows what they amount to. On
a Hessian that is not positive definite the solvers are damped here so as to take all their steps;
the errors are those at the lower minimum of problems A and B. Betty's conjugate gradients of this
release are wrong, whatever they cost.""",
    "fidelity": """\
Passes that see one mask have an error of rounding at any dropout; passes with masks of their own
have a cosine of 0.06 at dropout 0.05 already, and relative errors of 15 to 34. The spread over
draws is that of the exact term itself for the former, 30 times as much for the latter. In
bfloat16 (autocast) the difference is taken in float32, so the error is that of ∂F/∂w, which is
rounded; Betty's difference is rounded as well, and off by 20 % without any dropout.""",
    "scaling": """\
Three passes, whatever the rank, the number of modules and the length; about three adapters of
extra memory: a copy of w, ∂f/∂u and ∂F/∂w. A step of CG costs a product on the kept graph, about
1.2 plain steps, and no more memory than the first.""",
    "noise": """\
A solver that starts anew on each batch inverts that batch's Hessian; `warm` averages over batches.
A bias near the sampling error is none: that of `warm` with a constant small step falls with the
number of draws, that of `cg` does not. Advice is in
[the mathematics](../docs/mathematics.md#minibatches).""",
    "faults": """\
Small models, so that a run is a second and many can be killed: what is tested is what is written
and in which order, not how long it takes. A run begins anew where it was killed before its first
checkpoint was whole. SIGKILL ends a process, not the machine: what the system had not yet written
to the disk when its power fails is noticed by the hashes, and the checkpoint before is used. A full
disk is here a limit on the size of files, at which the system refuses to go on in the middle of
one. Not covered: several processes, GPUs, and collators that draw random numbers, which draw others
after a resumption.""",
}


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
