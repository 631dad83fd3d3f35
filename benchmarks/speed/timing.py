"""Everything that is timed, in one command: the bilevel step, the DoRA layer, the MLP's iteration.

    python benchmarks/speed timing      # some six minutes; writes benchmarks/results/speed.json
    python benchmarks/speed timing --quick

*Steps*: MiniLM, all linear layers adapted, rank 8, 32 × 64 tokens. The unit is a training step of
PEFT's DoRA: forward, backward, clipping and AdamW. A bilevel step is ``lower`` such steps of the
directions, with the fast layer, and one of the magnitudes; a quarter upper batch has a quarter of
the rows. *Layer*: forward+backward of the same model without an optimizer; the frozen model with
the gradient of its first layer's input is the floor. *Kept* is the memory between forward and
backward pass. *MLP*: a lower step, a hypergradient and an upper step of a small problem
(`mlp`), in forward+backward passes of its lower loss.

All runs of a table are interleaved; times are medians, ratios medians of the ratios within each
round. Steps and layer are measured twice: as the C library is by default, and where it keeps freed
memory, without which a step may or may not pay for page faults.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import arguments, interleaved, keep_memory, kept_bytes, ratio, report
from benchmarks.minilm import Method, batches, bidora, encoder, minilm
from benchmarks.pages import RESULTS
from benchmarks.speed.dora_layer import LAYERS, single_layer
from benchmarks.speed.mlp import batch, engine, networks, weighted_loss

FORWARD = "darts:scheme=forward"
UNIT = "DoRA step, PEFT layer"
FLOOR = "frozen, no adapter"
ITERATIONS = {
    "direct": "direct",
    "darts": FORWARD,
    # Damped, since the Hessian is indefinite: so it takes all five steps.
    "cg5": "cg:steps=5,damping=1.0,tolerance=0.0",
}
Run = Callable[[], object]
Row = dict[str, Any]


def dora_step(method: Method, data: list[dict[str, Tensor]], device: str) -> Run:
    """One training step of plain DoRA; every call is the next one."""
    model = minilm(method, device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def endless() -> Iterator[dict[str, Tensor]]:
        while True:
            yield from data

    stream = endless()

    def run() -> None:
        model(**next(stream)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def steps(
    size: int, length: int, device: str, estimators: Sequence[str] = ("direct", FORWARD)
) -> tuple[dict[str, Run], dict[str, int]]:
    """DoRA steps and BiDoRA steps by name, and the lower steps of each."""
    data = batches(4, size, length, device=device)
    quarter = [{name: x[: size // 4] for name, x in each.items()} for each in data]
    runs = {UNIT: dora_step("PEFT DoRA", data, device)}
    runs["DoRA step, fast layer"] = dora_step("fast full", data, device)
    lower = dict.fromkeys(runs, 1)
    for estimator in estimators:
        for count in (1, 4):
            for name, above in (("full", data), ("quarter", quarter)):
                model = minilm("fast full", device=device)
                search = bidora(model, data, above[::-1], estimator, lower_steps=count)
                name = f"BiDoRA {count}:1, {name} upper batch, {estimator}"
                runs[name], lower[name] = partial(search.run, 1), count
    return runs, lower


def layers(size: int, length: int, device: str) -> tuple[dict[str, Run], dict[str, float]]:
    """Forward and backward of MiniLM by the method of its layers, and the kept MB of each."""
    (one,) = batches(1, size, length, device=device)
    models: dict[str, Any] = {method: minilm(method, device=device) for method in LAYERS}
    frozen = encoder().train().to(device).requires_grad_(False)
    frozen.bert.embeddings.register_forward_hook(lambda *call: call[2].requires_grad_())
    models[FLOOR] = frozen

    def both(model: Any) -> None:
        model.zero_grad(set_to_none=True)
        model(**one).loss.backward()

    kept = {name: kept_bytes(lambda m=m: m(**one).loss, m) / 2**20 for name, m in models.items()}
    return {name: partial(both, model) for name, model in models.items()}, kept


def mlp_iterations(device: str) -> dict[str, Run]:
    """G, a forward+backward pass of the lower loss, and an iteration with each estimator."""
    net, weigher = networks(device)
    (x, y), w = batch(0, device), list(net.parameters())
    runs: dict[str, Run] = {
        "G": lambda: torch.autograd.grad(weighted_loss(net(x), y, weigher), w),
    }
    for name, estimator in ITERATIONS.items():
        runs[name] = partial(engine(estimator, device).run, 1)
    return runs


def timed(
    runs: dict[str, Run], repeats: int, device: str, unit: str, lower: dict[str, int]
) -> list[Row]:
    """A row for each run; ``lower`` has the lower steps of those that are steps."""
    seconds = interleaved(runs, repeats, device)
    rows = []
    for name in runs:
        step_ratio = ratio(seconds, name, unit)
        row = {"run": name, "ms": 1e3 * statistics.median(seconds[name]), f"÷ {unit}": step_ratio}
        rows.append(row | ({"per lower step": step_ratio / lower[name]} if name in lower else {}))
    return rows


def main() -> None:
    """Measure, print, and write JSON."""
    options = arguments("step, layer and MLP iteration, interleaved")
    device, quick = options.device, options.quick
    if not quick and options.json is None:
        options.json = RESULTS / "speed.json"
    size, length, repeats = (4, 8, 1) if quick else (32, 64, 5)
    step_runs, lower = steps(size, length, device, *([("direct",)] if quick else []))
    (layer_runs, kept), tables = layers(size, length, device), {}
    for memory in ("default",) if quick else ("default", "freed memory kept"):
        if memory != "default" and not (device == "cpu" and keep_memory()):
            continue
        tables[f"Steps, {memory}"] = timed(step_runs, repeats, device, UNIT, lower)
        rows = timed(layer_runs, 2 * repeats, device, "PEFT DoRA", {})
        tables[f"Layer, {memory}"] = [row | {"kept MB": kept[row["run"]]} for row in rows]
    widths = (384,) if quick else (384, 4096)
    tables["Single layers"] = [single_layer(width, 256, 4 * repeats, device) for width in widths]
    tables["MLP, upper iteration"] = timed(
        mlp_iterations(device), 5 if quick else 100, device, "G", {}
    )
    report(options, tables, {"tokens": f"{size}×{length}"})
