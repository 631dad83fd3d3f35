"""Times and memory of DoRA layers: PEFT's, the fast one, LoRA. Prints JSON.

    python benchmark.py [--rounds 15] [--threads 1] [--device cuda] [--dtype bfloat16]

One layer of a square weight of rank 8, all kinds in turn in each round: a training step (forward,
backward and the input's gradient) and an inference pass. A ratio is the median over the rounds of
a kind's time over the time of PEFT's DoRA in the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import torch
from fast_dora import enable_fast_dora
from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from torch import Tensor, nn

SIZES = ((384, 2048), (768, 1024), (2048, 256), (2048, 8))
KINDS = ("PEFT DoRA", "fast DoRA", "LoRA")
Step = Callable[[], object]


def adapted(kind: str, width: int, dropout: float, like: Tensor) -> nn.Module:
    """A linear layer with an adapter whose B is not zero, in training mode."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, width)).to(like)
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=dropout, target_modules=["0"], use_dora=kind != "LoRA"
    )
    model: nn.Module = get_peft_model(base, config).to(like.dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    if kind.startswith("fast"):
        enable_fast_dora(model)
    return model.train()


def training(model: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """Forward and backward pass, with the gradient of x as inside a network."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).backward(dy)

    return run


def inference(model: nn.Module, x: Tensor, caching: bool) -> Step:
    """A forward pass in evaluation mode; with the cache filled where ``caching``."""
    model.eval()

    def run() -> None:
        with torch.no_grad(), DoraCaching() if caching else nullcontext():
            model(x)

    return run


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass saves for the backward pass, without x and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)  # held, so that no storage is used twice
        sizes = [size for pointer, size in found.items() if pointer not in known]
    del output
    return sum(sizes)


def cached(model: nn.Module) -> int:
    """Bytes in the caches of DoraCaching."""
    caches: list[dict[str, Tensor]] = [getattr(m, "_dora_cache", {}) for m in model.modules()]
    return sum(t.untyped_storage().nbytes() for cache in caches for t in cache.values())


def times(steps: dict[str, Step], rounds: int, device: str) -> dict[str, Any]:
    """Median milliseconds, and median ratios to PEFT's DoRA, of interleaved runs."""
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for counted in range(-2, rounds):
        for kind, step in steps.items():
            if device != "cpu":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            if counted >= 0:
                seconds[kind].append(time.perf_counter() - begin)
    unit = seconds["PEFT DoRA"]
    ratios = {k: [s / u for s, u in zip(seconds[k], unit, strict=True)] for k in steps}
    return {
        "ms": {k: round(1e3 * statistics.median(s), 3) for k, s in seconds.items()},
        "ratio": {k: round(statistics.median(r), 3) for k, r in ratios.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    like = torch.zeros(0, device=options.device, dtype=getattr(torch, options.dtype))
    rows = []
    for width, tokens in SIZES:
        x = torch.randn(tokens, width).to(like).requires_grad_()
        dy = torch.randn(tokens, width).to(like)
        for dropout in (0.0, 0.1):
            models = {kind: adapted(kind, width, dropout, like) for kind in KINDS}
            steps = {kind: training(model, x, dy) for kind, model in models.items()}
            row: dict[str, Any] = {"width": width, "tokens": tokens, "pass": "training"}
            row |= {"dropout": dropout, **times(steps, options.rounds, options.device)}
            rows.append(row | {"kept bytes": {k: kept(m, x) for k, m in models.items()}})
        for caching in (False, True):
            models = {kind: adapted(kind, width, 0.0, like) for kind in KINDS}
            steps = {kind: inference(model, x, caching) for kind, model in models.items()}
            row = {"width": width, "tokens": tokens, "pass": "inference", "DoraCaching": caching}
            row |= times(steps, options.rounds, options.device)
            rows.append(row | {"cached bytes": {k: cached(m) for k, m in models.items()}})
    used = {"torch": torch.__version__, "peft": peft.__version__} | vars(options)
    print(json.dumps({"settings": used, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
