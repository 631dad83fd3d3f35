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

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import arguments, interleaved, keep_memory, kept_bytes, report, table_of
from benchmarks.minilm import Method, batches, bidora, encoder, minilm
from benchmarks.pages import RESULTS
from benchmarks.speed import mlp

FORWARD = "darts:scheme=forward"
LAYERS: tuple[Method, ...] = ("PEFT DoRA", "fast full", "LoRA")
UNIT = "DoRA step, PEFT layer"
FLOOR = "frozen, no adapter"
ESTIMATORS = ("direct", FORWARD)
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


def step_table(
    size: int, length: int, device: str, repeats: int, estimators: Sequence[str] = ESTIMATORS
) -> list[Row]:
    """DoRA steps and BiDoRA steps."""
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
                runs[name] = partial(search.run, 1)
                lower[name] = count
    rows = timed(runs, repeats, device, UNIT)
    return [row | {"per lower step": row[f"÷ {UNIT}"] / lower[row["run"]]} for row in rows]


def layer_table(size: int, length: int, device: str, repeats: int) -> list[Row]:
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
    runs = {name: partial(both, model) for name, model in models.items()}
    rows = timed(runs, repeats, device, LAYERS[0])
    return [row | {"kept MB": kept[row["run"]]} for row in rows]


def mlp_table(device: str, repeats: int) -> list[Row]:
    """G, a forward+backward pass of the lower loss, and an iteration with each estimator."""
    net, weigher = mlp.networks(device)
    batch, w = mlp.batch(0, device), list(net.parameters())
    runs: dict[str, Run] = {
        "G": lambda: torch.autograd.grad(mlp.weighted_loss(net, weigher, batch), w),
    }
    for name, estimator in ITERATIONS.items():
        runs[name] = partial(mlp.engine(estimator, device).run, 1)
    return timed(runs, repeats, device, "G")


def timed(runs: dict[str, Run], repeats: int, device: str, unit: str) -> list[Row]:
    """A row for each run: its median, and its ratio to that of ``unit``."""
    rows = table_of(interleaved(runs, repeats, device), unit)
    return [
        {"run": row["run"], "ms": 1e3 * row["s"], f"÷ {unit}": row[f"÷ {unit}"]} for row in rows
    ]


def main() -> None:
    """Measure, print, and write JSON."""
    options = arguments("step, layer and MLP iteration, interleaved")
    device, quick = options.device, options.quick
    if not quick and options.json is None:
        options.json = RESULTS / "speed.json"
    size, length, repeats = (4, 8, 1) if quick else (32, 64, 5)
    estimators = ESTIMATORS[:1] if quick else ESTIMATORS
    tables = {}
    for memory in ("default",) if quick else ("default", "freed memory kept"):
        if memory != "default" and not (device == "cpu" and keep_memory()):
            continue
        tables[f"Steps, {memory}"] = step_table(size, length, device, repeats, estimators)
        tables[f"Layer, {memory}"] = layer_table(size, length, device, 2 * repeats)
    tables["MLP, upper iteration"] = mlp_table(device, 5 if quick else 100)
    report(options, tables, {"tokens": f"{size}×{length}"})
