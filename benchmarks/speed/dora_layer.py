"""One DoRA layer: PEFT's, ours, and LoRA's."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.measure import interleaved, kept_bytes, ratio
from benchmarks.minilm import Method
from hyperopt_peft.adapters import use_fast_dora

LAYERS: tuple[Method, ...] = ("PEFT DoRA", "fast full", "LoRA")
UNIT = LAYERS[0]


class Layer(nn.Module):
    """One linear layer, called ``layer``."""

    def __init__(self, width: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) to (tokens, width)."""
        y: Tensor = self.layer(x)
        return y


def layer(method: Method, width: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A layer of ``width`` × ``width`` with an adapter of rank 8."""
    torch.manual_seed(0)
    module: Any = Layer(width, device, dtype)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["layer"], use_dora=method != "LoRA")
    model = get_peft_model(module, config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
            if "magnitude" in name:
                parameter.mul_(1.1)
    if method == "fast full":
        use_fast_dora(model)
    return model.train()


def single_layer(
    width: int, tokens: int, repeats: int, device: str, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """One layer with every method, whose input needs a gradient as inside a model."""
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, width, device=device, dtype=dtype)
    layers = {method: layer(method, width, device, dtype) for method in LAYERS}

    def step(module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            module.zero_grad(set_to_none=True)
            x.grad = None
            module(x).backward(dy)

        return run

    seconds = interleaved({m: step(module) for m, module in layers.items()}, repeats, device)
    sizes = {m: kept_bytes(lambda k=k: k(x), k) for m, k in layers.items()}
    row: dict[str, Any] = {"layer": f"{width}²", "dtype": str(dtype)[6:], "tokens": tokens}
    row["PEFT DoRA ms"] = 1e3 * statistics.median(seconds[UNIT])
    row |= {f"{m} ÷ PEFT": ratio(seconds, m, UNIT) for m in layers if m != UNIT}
    return row | {"kept, fast full ÷ PEFT": sizes["fast full"] / sizes[UNIT]}
