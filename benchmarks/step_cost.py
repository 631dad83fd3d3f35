"""What a bilevel step costs beside a DoRA step, in time, passes and memory.

    python benchmarks/step_cost.py --json step_cost.json

MiniLM, all linear layers adapted, rank 8. One step of DoRA is a forward, a backward, clipping and
AdamW. A bilevel iteration is ``lower_steps`` such steps of the directions and one of the
magnitudes. Everything is interleaved in one process. Peak memory is that of the first two
iterations, so that optimizer states and the copies that are kept count in all of them. The main
table is measured twice: as the allocator is by default, and where it keeps freed memory.

"A quarter above": the upper batch is a quarter of the lower one, and the directional passes see a
quarter of the lower step's batch. They are two then, since the lower step has not computed ∂f/∂u
of that quarter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from measure import Target, arguments, interleaved, keep_memory, ratio, report
from minilm import Method, batches, bidora, minilm
from torch import Tensor

from hyperopt_peft import Engine
from hyperopt_peft.adapters import split_parameters
from hyperopt_peft.diagnostics.memory import peak_memory
from hyperopt_peft.hypergradients import DARTS, Oracle, Vector

FORWARD = "darts:scheme=forward"
QUARTER = "darts, a quarter above"
ESTIMATORS = (
    "direct",
    FORWARD,
    "darts",
    "darts:product=exact",
    "neumann:terms=5,step_size=0.1",
    "cg:steps=5,damping=1.0,tolerance=0.0",
)
LAYERS: dict[str, Method] = {"PEFT": "PEFT DoRA", "fast": "fast full"}
UNIT = "DoRA step, PEFT layer"
Batches = list[dict[str, Tensor]]
Run = Callable[[], object]


def dora_step(method: Method, data: Batches, device: str) -> Run:
    """One training step of plain DoRA; every call is the next one."""
    model = minilm(method, device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    stream = _endless(data)

    def run() -> None:
        model(**next(stream)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _endless(data: Batches) -> Any:
    while True:
        yield from data


def _twice(run: Run) -> Run:
    return lambda: (run(), run())


@dataclass(frozen=True)
class QuarterDARTS(DARTS):
    """`darts` whose directional passes see the first quarter of the lower step's batch."""

    def mixed(self, oracle: Oracle, v: Vector) -> Vector:
        """∂²f/∂u∂w · v on a quarter of the batch."""
        last = oracle.history[-1]
        record = replace(last, batch=quarter(last.batch))
        return super().mixed(replace(oracle, history=[record]), v)


def quarter(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first quarter of the rows."""
    return {name: x[: len(x) // 4] for name, x in batch.items()}


def bilevel(method: Method, estimator: str, lower_steps: int, data: Batches, device: str) -> Engine:
    """BiDoRA's search, ready to run."""
    model, above = minilm(method, device=device), data[::-1]
    if estimator == QUARTER:
        above = [quarter(batch) for batch in above]
        return bidora(model, data, above, QuarterDARTS(), lower_steps=lower_steps)
    return bidora(model, data, above, estimator, lower_steps=lower_steps)


def measure(
    size: int, length: int, wanted: list[tuple[str, str, int]], repeats: int, device: str
) -> list[dict[str, Any]]:
    """A row for each (layer, estimator, lower_steps)."""
    data = batches(4, size, length, device=device)
    runs: dict[str, Run] = {}
    peaks: dict[str, int] = {}
    for layer, method in LAYERS.items():
        name = f"DoRA step, {layer} layer"
        runs[name] = dora_step(method, data, device)
        peaks[layer] = peak_memory(_twice(runs[name]), torch.device(device))
    adapter = 0
    for layer, estimator, lower_steps in wanted:
        engine = bilevel(LAYERS[layer], estimator, lower_steps, data, device)
        split = split_parameters(engine.lower.model)
        owned = (*split.directions.values(), *split.magnitudes.values())
        adapter = sum(p.numel() * p.element_size() for p in owned)
        name = f"{layer}, {estimator}, {lower_steps}"
        peaks[name] = peak_memory(lambda e=engine: e.run(2), torch.device(device))
        runs[name] = lambda e=engine: e.run(1)
    # Two iterations of each have just been run for their peak memory.
    seconds = interleaved(runs, repeats, device, warmup=0)
    rows = [
        {
            "tokens": f"{size}×{length}",
            "layer": layer,
            "estimator": "none: a DoRA step",
            "lower steps": 1,
            "ms": 1e3 * statistics.median(seconds[f"DoRA step, {layer} layer"]),
            "÷ DoRA step": ratio(seconds, f"DoRA step, {layer} layer", UNIT),
            "per lower step": ratio(seconds, f"DoRA step, {layer} layer", UNIT),
            "extra memory ÷ adapter": (peaks[layer] - peaks["PEFT"]) / adapter,
            "extra memory ÷ adapter, same layer": 0.0,
        }
        for layer in LAYERS
    ]
    for layer, estimator, lower_steps in wanted:
        name = f"{layer}, {estimator}, {lower_steps}"
        whole = ratio(seconds, name, UNIT)
        rows.append(
            {
                "tokens": f"{size}×{length}",
                "layer": layer,
                "estimator": estimator,
                "lower steps": lower_steps,
                "ms": 1e3 * statistics.median(seconds[name]),
                "÷ DoRA step": whole,
                "per lower step": whole / lower_steps,
                "extra memory ÷ adapter": (peaks[name] - peaks["PEFT"]) / adapter,
                "extra memory ÷ adapter, same layer": (peaks[name] - peaks[layer]) / adapter,
            }
        )
    return rows


def times(rows: list[dict[str, Any]], where: str = "") -> list[Target]:
    """The targets of one-sided darts, and of four lower steps with a quarter above."""
    found = {(r["layer"], r["lower steps"], r["estimator"]): r["per lower step"] for r in rows}
    four = "4 lower steps an upper step, per lower step"
    targets = [
        ("BiDoRA step", "PEFT", 1, FORWARD, 2.9),
        ("BiDoRA step", "fast", 1, FORWARD, 1.8),
        (four, "PEFT", 4, FORWARD, 1.5),
        (f"{four}, a quarter above", "fast", 4, QUARTER, 0.95),
    ]
    return [
        Target(f"{name} ÷ PEFT DoRA step, {layer} layer{where}", found[layer, k, estimator], most)
        for name, layer, k, estimator, most in targets
    ]


def main() -> None:
    """Measure, print, and write JSON where asked for."""
    given = arguments("time and memory of a bilevel step beside a DoRA step")
    short = [(layer, FORWARD, k) for layer in LAYERS for k in (1, 4)]
    short += [(layer, QUARTER, 4) for layer in LAYERS]
    tables = {}
    if given.quick:
        rows = measure(8, 64, short, 3, given.device)
    else:
        rows = measure(32, 64, short, 5, given.device)
        estimators = [(layer, name, 1) for layer in LAYERS for name in ESTIMATORS]
        tables["Estimators"] = measure(8, 32, estimators, 5, given.device)
        steps = [(layer, name, 8) for layer in LAYERS for name in ("direct", FORWARD, "darts")]
        tables["Eight lower steps"] = measure(8, 32, steps, 2, given.device)
    targets = times(rows) + [
        Target(
            f"extra peak memory of a darts step over plain DoRA training ÷ adapter, {layer} layer",
            row["extra memory ÷ adapter, same layer"],
            4.0,
        )
        for layer in LAYERS
        for row in rows
        if (row["layer"], row["lower steps"], row["estimator"]) == (layer, 1, FORWARD)
    ]
    if not given.quick and given.device == "cpu" and keep_memory():
        tables["Freed memory kept by the process"] = measure(32, 64, short, 5, given.device)
        tables["A smaller batch, freed memory kept"] = measure(16, 64, short, 2, given.device)
        again = tables["Freed memory kept by the process"]
        targets += times(again, ", freed memory kept by the process")
    report(given, {"One and four lower steps": rows, **tables}, targets, {})


if __name__ == "__main__":
    main()
