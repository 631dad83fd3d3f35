"""Memory of large models' steps without a large machine: 8B and 70B, r = 16, eight cards or one.

    python benchmarks/speed on_paper                 # seconds; writes results/on_paper.json

The model is on the meta device, whose tensors have shapes and no numbers. *Weights and adapter* are
counted and divided by the cards, as FSDP2 shards them, and the weights of two layers are whole at a
time. *A pass* is run with checkpointing on 4 × 2048 tokens, and the peak of its living tensors is
measured: the states between layers, and what one layer recomputes. The head is not run: TRL's runs
in chunks. Attention is the flash kernel. ``direct`` and ``dots`` run in bf16. ``darts`` takes a
difference, for which shards must be in float32. DoRA, as in BiDoRA, has PEFT's layer, which runs on
shards. One card has the whole model, as each card of DDP. Allocators and communication need more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from benchmarks.measure import arguments, report
from benchmarks.memory import peak_memory
from benchmarks.pages import RESULTS
from benchmarks.speed import llama

CARDS, ROWS, LENGTH, RANK = 8, 4, 2048, 16
#: Layers whose weights are whole at a time: the one that is run, and the next one.
WHOLE = 2
GB = 1e9
#: Cards, adapter and estimator of each row.
CASES = [(CARDS, "LoRA", name) for name in ("direct", "dots", "darts")]
CASES += [(CARDS, "DoRA", "direct"), (1, "LoRA", "direct"), (1, "DoRA", "direct")]
#: The vectors of the adapter's size that an upper step keeps: darts also the displaced values.
DIRECTIONS = {"direct": 0, "dots": 1, "darts": 2}
Row = dict[str, Any]


def flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """The kernel that keeps no scores, ``(rows, tokens, heads, width)``."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(query, key, value, 0.0, True)[0].transpose(1, 2).contiguous(), None


AttentionInterface.register("on_paper", flash)


def on_a_card(shape: str, dtype: torch.dtype, cards: int = CARDS, dora: bool = False) -> Row:
    """Bytes of each of ``cards`` by part."""
    base = llama.base(shape, dtype=dtype, device="meta", attention="on_paper")
    adapted = llama.adapted(base, RANK, dora).train()
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = [p for p in adapted.parameters() if p.requires_grad]
    layer = adapted.get_base_model().model.layers[0]
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long, device="meta")

    def a_pass() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            states = adapted.get_base_model().model(ids).last_hidden_state
            torch.autograd.grad(states.float().sum(), adapter)

    frozen = [p for p in adapted.parameters() if not p.requires_grad]
    of_layer = [p for p in layer.parameters() if not p.requires_grad]
    return {
        "weights": size(frozen) / cards,
        "whole layers": WHOLE * size(of_layer) if cards > 1 else 0,
        # The adapter, its gradient, and Adam's two moments.
        "adapter and Adam": 4 * size(adapter) / cards,
        "a pass": peak_memory(a_pass, torch.device("meta")),
        "a direction": size(adapter) / cards,
    }


def size(tensors: Iterable[Tensor]) -> int:
    """The bytes of ``tensors``."""
    return sum(tensor.nbytes for tensor in tensors)


def table(shape: str) -> list[Row]:
    """Gigabytes of lower and upper step by estimator."""
    rows = []
    for cards, adapter, estimator in CASES:
        precision = "float32" if estimator == "darts" else "bf16"
        dtype = torch.float32 if estimator == "darts" else torch.bfloat16
        row = {"model": shape, "cards": cards, "adapter": adapter, "estimator": estimator}
        used = on_a_card(shape, dtype, cards, dora=adapter == "DoRA")
        lower = sum(used.values()) - used["a direction"]
        upper = lower + DIRECTIONS[estimator] * used["a direction"]
        sizes = {**used, "lower step": lower, "upper step": upper}
        gigabytes = {name: value / GB for name, value in sizes.items()}
        rows.append({**row, "in": precision, **gigabytes})
    return rows


def main() -> None:
    """Count, print, and write JSON."""
    options = arguments("memory of 8B and 70B on eight cards and on one, on paper")
    if not options.quick and options.json is None:
        options.json = RESULTS / "on_paper.json"
    shapes = ("tiny",) if options.quick else ("8B", "70B")
    rows = [row for shape in shapes for row in table(shape)]
    details = {"rows": ROWS, "tokens": LENGTH, "rank": RANK}
    report(options, {"GB on each card": rows}, details)
