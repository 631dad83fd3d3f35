"""A pytest plugin for PEFT's own tests: each DoRA layer that PEFT makes is a fast one."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer as lora

from hyperopt_peft.adapters.dora.fast import FastDora
from hyperopt_peft.adapters.peft_internals import DoraLinearVariant, LoraVariant

resolve = lora.Linear.resolve_lora_variant


def fast(layer: lora.Linear, **config: Any) -> LoraVariant | None:
    """The fast variant in place of PEFT's DoRA; other variants as they are."""
    variant: LoraVariant | None = resolve(layer, **config)
    return FastDora() if type(variant) is DoraLinearVariant else variant


lora.Linear.resolve_lora_variant = fast
