"""How time and memory of one BiDoRA iteration grow with the adapter, the input and the solver.

    python benchmarks/scaling.py --json scaling.json

An iteration is one lower and one upper step of `search`, on MiniLM; the unit is a plain training
step of PEFT's DoRA (forward, backward, clipping, AdamW) in the same setting and process. Ranks,
adapted modules and lengths are run with this library's DoRA layer and with PEFT's, whose gradient
holds the row norm constant; numbers of CG steps with this library's.

Memory is the peak of the first two iterations of a fresh model, less that of two plain steps, in
units of the bytes of A, B and m. (Two, since the optimizers' states are made at the end of the
first.) PEFT's layer keeps more activations than this library's, so that the difference to the step
with PEFT's layer can be negative; another column compares with the step that has the same layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from measure import arguments, interleaved, ratio, report
from minilm import Method, batches, bidora, minilm
from torch.nn.utils import clip_grad_norm_

from hyperopt_peft import Engine
from hyperopt_peft.adapters import split_parameters
from hyperopt_peft.diagnostics.memory import peak_memory
from hyperopt_peft.hypergradients import Estimate, Oracle
from hyperopt_peft.hypergradients.products import Passes

FAST: Method = "fast full"
PEFT: Method = "PEFT DoRA"
LAYERS = {FAST: "fast", PEFT: "PEFT"}
ONE_SIDED = "darts:scheme=forward"
RATE = 2e-3
Row = dict[str, Any]
Run = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """What the axes vary; the defaults are the point where they meet."""

    rank: int = 8
    modules: str = "query, value"
    length: int = 32
    size: int = 16
    device: str = "cpu"

    def model(self, method: Method) -> Any:
        """MiniLM with an adapter of these dimensions."""
        targets = self.modules if self.modules == "all-linear" else self.modules.split(", ")
        return minilm(method, rank=self.rank, targets=targets, device=self.device)


def plain_step(setting: Setting, method: Method) -> Run:
    """One training step of a fresh model, written without this library."""
    model = setting.model(method)
    variables = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(variables, lr=RATE, weight_decay=0.0)
    batch = batches(1, setting.size, setting.length, device=setting.device)[0]

    def run() -> None:
        model(**batch).loss.backward()
        clip_grad_norm_(variables, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def times(count: int, run: Run) -> Run:
    """``run``, ``count`` times."""

    def repeated() -> None:
        for _ in range(count):
            run()

    return repeated


def fresh_engine(setting: Setting, model: Any, estimator: str) -> tuple[Engine, list[Passes]]:
    """The search on ``model``, and a list that gets the passes of each hypergradient."""
    below, above = (
        batches(2, setting.size, setting.length, seed, setting.device) for seed in (0, 1)
    )
    engine = bidora(model, below, above, estimator, rate=RATE)
    passes: list[Passes] = []

    class Counted(type(engine.estimator)):  # type: ignore[misc]
        """The engine's estimator, which puts down what each estimate cost."""

        def estimate(self, oracle: Oracle) -> Estimate:
            """As the estimator's own."""
            result: Estimate = super().estimate(oracle)
            passes.append(oracle.passes)
            return result

    engine.estimator = Counted(**vars(engine.estimator))
    return engine, passes


def adapter_bytes(model: Any) -> int:
    """Bytes of A, B and m; the head is not the adapter's."""
    parts = split_parameters(model)
    owned = [*parts.directions.values(), *parts.magnitudes.values()]
    return sum(p.numel() * p.element_size() for p in owned)


def point(setting: Setting, variants: Sequence[tuple[Method, str]], repeats: int) -> list[Row]:
    """A row for each layer and estimator, all interleaved with the plain step."""
    device = torch.device(setting.device)
    plain = plain_step(setting, PEFT)
    peaks = {PEFT: peak_memory(times(2, plain), device)}
    if any(method == FAST for method, _ in variants):
        peaks[FAST] = peak_memory(times(2, plain_step(setting, FAST)), device)
    runs: dict[str, Run] = {"plain": plain}
    rows: list[Row] = []
    for method, estimator in variants:
        model = setting.model(method)
        engine, passes = fresh_engine(setting, model, estimator)
        iteration = partial(engine.run, 1)
        peak = peak_memory(times(2, iteration), device)
        unit = adapter_bytes(model)
        runs[f"{method}, {estimator}"] = iteration
        rows.append(
            {
                "layer": LAYERS[method],
                "estimator": estimator,
                "fwd+bwd": engine.lower_steps + passes[-1].gradients,
                "products": passes[-1].products,
                "adapter KB": unit / 2**10,
                "peak MB": peak / 2**20,
                "extra memory ÷ adapter": (peak - peaks[PEFT]) / unit,
                "extra memory ÷ adapter, same layer": (peak - peaks[method]) / unit,
            }
        )
    # Two iterations of each have run already.
    seconds = interleaved(runs, repeats, setting.device, warmup=0)
    for row, name in zip(rows, list(runs)[1:], strict=True):
        row["plain ms"] = round(1e3 * statistics.median(seconds["plain"]))
        row["ms"] = round(1e3 * statistics.median(seconds[name]))
        row["time ÷ plain"] = ratio(seconds, name, "plain")
    return rows


def main() -> None:
    """Measure, print, and write JSON where asked for."""
    given = arguments("time and memory of a BiDoRA iteration along four axes")
    start = Setting(device=given.device, size=4 if given.quick else 16)
    axes: dict[str, Sequence[Any]] = {
        "rank": (2, 4, 8, 16, 32, 64),
        "modules": ("query", "query, value", "query, key, value", "all-linear"),
        "length": (16, 32, 64, 128, 256),
    }
    cg_steps: Sequence[int] = (1, 2, 5, 10, 20)
    repeats = 4
    if given.quick:
        axes = {axis: values[::2][:2] for axis, values in axes.items()}
        cg_steps, repeats = cg_steps[::2][:2], 2
    tables: dict[str, list[Row]] = {}
    for axis, values in axes.items():
        rows = tables[f"By {axis}, batch {start.size}"] = []
        for value in values:
            found = point(
                replace(start, **{axis: value}), [(m, ONE_SIDED) for m in LAYERS], repeats
            )
            rows += [{axis: value, **row} for row in found]
    solvers = [(FAST, f"cg:steps={k},damping=1.0,tolerance=0.0") for k in cg_steps]
    found = point(start, solvers, repeats)
    rows = [{"CG steps": k, **row} for k, row in zip(cg_steps, found, strict=True)]
    tables[f"By CG steps, batch {start.size}"] = rows
    report(given, tables, [], {"default setting": asdict(start), "repeats": repeats})


if __name__ == "__main__":
    main()
