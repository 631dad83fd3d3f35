"""Hypergradients in bfloat16, computed in two ways, beside the noise of each.

A difference is relative. *Again* computes the same once more. *Other order* reverses the rows of
both batches, which changes a hypergradient by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import llama
from benchmarks.speed.gpu.machine import Machine, attempted
from benchmarks.speed.language import DOTS
from hyperopt_peft import hypergradient
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.method import TaskLevel

Row = dict[str, Any]
ESTIMATORS = ("direct", DOTS, "darts", "minres:steps=2,product=difference", "minres:steps=2")


def batches(machine: Machine, reverse: bool) -> dict[str, Any]:
    """A batch of each level, half of the default's rows and tokens; the lower one has sources."""
    made = []
    for seed in (0, 1):
        size, length = (max(n // 2, 2) for n in machine.sizes.values())
        batch = llama.collated(llama.rows(machine.shape, size, length, seed).to_list())
        batch["source"] = torch.arange(size) % 2
        made.append({n: (x.flip(0) if reverse else x).to(machine.device) for n, x in batch.items()})
    made[1].pop("source")
    return {"lower_batch": made[0], "upper_batch": made[1]}


def computed(machine: Machine, model: Any, estimator: str, *, reverse: bool = False) -> Tensor:
    """The hypergradient of two source weights, ``(2,)``; by ``direct`` that of all B, flat.

    The upper loss does not read the weights of sources, so that ``direct`` would give 0.
    """
    data = batches(machine, reverse)
    upper: Any
    lower: Any
    if estimator == "direct":
        data["lower_batch"].pop("source")
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        upper = TaskLevel(model, [pair for pair in named if "lora_B" in pair[0]])
        lower = TaskLevel(model, [pair for pair in named if "lora_B" not in pair[0]])
    else:
        logits = torch.zeros(2, device=machine.device, requires_grad=True)
        weights = lambda batch: 2 * logits.softmax(0)[batch["source"]]  # noqa: E731
        upper = TaskLevel(model, [logits])
        lower = WeightedRows(model, weights, tags=["source"])
    with torch.autocast(torch.device(machine.device).type, torch.bfloat16):
        parts = hypergradient(upper, lower, estimator, **data)
    return torch.cat([part.flatten().double() for part in parts])


def relative(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ by ‖one‖."""
    return float((one - other).norm() / one.norm())


def equality(machine: Machine) -> Iterator[Row]:
    """Each estimator without checkpointing, and with it beside that."""
    model, expected = machine.model(), dict[str, Tensor]()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        for estimator in ESTIMATORS:
            values, result = attempted(partial(noisy, machine, model, estimator))
            if values and not checkpointing:
                expected[estimator] = values[0]
            known = values and checkpointing and estimator in expected
            yield {
                "estimator": estimator,
                "checkpointing": "yes" if checkpointing else "no",
                "with − without": relative(expected[estimator], values[0]) if known else None,
                **noise(values),
                "result": result,
            }


def noisy(machine: Machine, model: Any, estimator: str) -> list[Tensor]:
    """A hypergradient, the same again, and in the other order of rows."""
    one = partial(computed, machine, model, estimator)
    return [one(), one(), one(reverse=True)]


def noise(values: list[Tensor] | None) -> Row:
    """The noise of the `noisy` ``values``."""
    names = ("again", "other order")
    if values is None:
        return dict.fromkeys(names)
    return {key: relative(values[0], other) for key, other in zip(names, values[1:], strict=True)}
