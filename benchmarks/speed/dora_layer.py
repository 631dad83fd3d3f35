"""What a DoRA layer costs: PEFT's, ours, LoRA's and full fine-tuning.

    python benchmarks/speed dora_layer --json dora_layer.json

Time of one forward+backward and bytes kept between them, for the whole of MiniLM (all linear
layers adapted, rank 8, 32 × 64 tokens) and for single layers of several widths and numbers of
tokens, all interleaved; and how far outputs and gradients are from PEFT's and from the closed form.
The frozen model without an adapter, with the gradient of its first layer's input, is the floor.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.measure import (
    Target,
    arguments,
    interleaved,
    kept_bytes,
    ratio,
    report,
)
from benchmarks.minilm import PREPARE, batches, encoder, minilm

METHODS = ("LoRA", "PEFT DoRA", "norm in graph", "fast full", "fast detach")
UNIT = "PEFT DoRA"
FLOOR = "frozen, no adapter"
Row = dict[str, Any]


def whole_model(repeats: int, dropout: float, size: int, length: int, device: str) -> list[Row]:
    """MiniLM with every method: milliseconds, ratio to PEFT's DoRA, kept bytes."""
    batch = batches(1, size, length, device=device)[0]
    models = {
        method: minilm(method, dropout=dropout, device=device)
        for method in (*METHODS, "full fine-tuning")
    }
    frozen = encoder().train().to(device).requires_grad_(False)
    frozen.bert.embeddings.register_forward_hook(lambda *call: call[2].requires_grad_())
    models[FLOOR] = frozen
    rows = []
    sizes = {name: kept_bytes(lambda m=m: m(**batch).loss, m) for name, m in models.items()}
    rest = sizes[FLOOR]
    seconds = interleaved({n: _step(m, batch) for n, m in models.items()}, repeats, device)
    for name in models:
        rows.append(
            {
                "MiniLM": name,
                "adapter dropout": dropout,
                "ms": 1e3 * statistics.median(seconds[name]),
                "time ÷ PEFT DoRA": ratio(seconds, name, UNIT),
                "kept MB": sizes[name] / 2**20,
                "kept ÷ PEFT DoRA": sizes[name] / sizes[UNIT],
                "kept by its layers ÷ PEFT DoRA": (sizes[name] - rest) / (sizes[UNIT] - rest),
            }
        )
    return rows


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    return run


class Layer(nn.Module):
    """One linear layer, called ``layer``."""

    def __init__(self, width: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) to (tokens, width)."""
        y: Tensor = self.layer(x)
        return y


def layer(method: str, width: int, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer of ``width`` × ``width`` with an adapter of rank 8."""
    torch.manual_seed(0)
    module: Any = Layer(width, device, dtype)
    if method == "full fine-tuning":
        return module  # type: ignore[no-any-return]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["layer"], use_dora=method != "LoRA")
    model = get_peft_model(module, config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
            if "magnitude" in name:
                parameter.mul_(1.1)
    PREPARE.get(method, lambda model: model)(model)
    return model.train()


def single_layer(
    width: int, tokens: int, repeats: int, device: str, dtype: torch.dtype = torch.float32
) -> list[Row]:
    """One layer with every method, whose input needs a gradient as inside a model."""
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, width, device=device, dtype=dtype)
    layers = {m: layer(m, width, device, dtype) for m in (*METHODS, "full fine-tuning")}

    def step(module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            module.zero_grad(set_to_none=True)
            x.grad = None
            module(x).backward(dy)

        return run

    seconds = interleaved({m: step(module) for m, module in layers.items()}, repeats, device)
    sizes = {m: kept_bytes(lambda k=k: k(x), k) for m, k in layers.items()}
    row: Row = {"layer": f"{width}²", "dtype": str(dtype)[6:], "tokens": tokens}
    row["PEFT DoRA ms"] = 1e3 * statistics.median(seconds[UNIT])
    row |= {f"{m} ÷ PEFT": ratio(seconds, m, UNIT) for m in layers if m != UNIT}
    row |= {"kept, fast full ÷ PEFT": sizes["fast full"] / sizes[UNIT]}
    return [row]


def equality(device: str) -> list[Row]:
    """Largest relative difference of outputs and gradients in MiniLM's shapes."""
    rows = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for ours, theirs in (("fast detach", UNIT), ("fast full", "norm in graph")):
            if dtype == torch.float64 and device == "mps":
                continue
            values, expected = (_values(m, dtype, device) for m in (ours, theirs))
            exact = _values(theirs, torch.float64, device)
            rows.append(
                {
                    "ours": ours,
                    "theirs": theirs,
                    "dtype": str(dtype)[6:],
                    "ours against theirs": _difference(values, expected),
                    "ours against float64": _difference(values, exact),
                    "theirs against float64": _difference(expected, exact),
                }
            )
    return rows


def _values(method: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Output and gradients of one layer, whose numbers are those of bfloat16 in every dtype."""
    module = layer(method, 384, device, torch.bfloat16).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(512, 384, generator=generator).bfloat16() for _ in range(2))
    x = x.to(device, dtype).requires_grad_()
    y = module(x)
    y.backward(dy.to(y))
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return [tensor.double() for tensor in (y.detach(), x.grad, *gradients) if tensor is not None]


def _difference(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(values, expected, strict=True))


def main() -> None:
    """Measure, print, and write JSON where asked for."""
    options = arguments("time, kept activations and equality of DoRA layers")
    quick, device = options.quick, options.device
    rows = whole_model(2 if quick else 15, 0.0, 32, 64, device)
    fast = next(row for row in rows if row["MiniLM"] == "fast full")
    sizes = [(384, 256), (384, 2048)]
    if not quick:
        sizes += [(768, 2048), (1536, 2048), (1536, 512), (4096, 256), (4096, 1024)]
    if device != "cpu":
        sizes = [(width, tokens) for width in (1024, 4096, 8192) for tokens in (512, 4096, 16384)]
    singles = []
    for width, tokens in sizes:
        for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
            repeats = 5 if quick or width * tokens > 2**21 else 20
            singles += single_layer(width, tokens, repeats, device, dtype)
    if not quick:
        rows += whole_model(10, 0.1, 32, 64, device)
    targets = [
        Target("DoRA layer, time ÷ PEFT, MiniLM", fast["time ÷ PEFT DoRA"], 0.65),
        Target("DoRA layer, kept activations ÷ PEFT, whole MiniLM", fast["kept ÷ PEFT DoRA"], 0.55),
        Target(
            "DoRA layer, kept activations ÷ PEFT, adapted layers alone",
            fast["kept by its layers ÷ PEFT DoRA"],
            0.55,
        ),
    ]
    tables = {
        "Whole model, 32×64 tokens": rows,
        "Single layers": singles,
        "Equality": equality(device),
    }
    report(options, tables, targets, {})
