"""A pytest plugin for PEFT's own tests: each DoRA layer that PEFT makes is a fast one.

A test that asks the hub for a model is skipped, since the tests run offline.
"""

from __future__ import annotations

from typing import Any

import pytest
from peft.tuners.lora import layer as lora

from hyperopt_peft.adapters.dora.fast import FastDora
from hyperopt_peft.adapters.peft_internals import DoraLinearVariant, LoraVariant

resolve = lora.Linear.resolve_lora_variant


def fast(layer: lora.Linear, **config: Any) -> LoraVariant | None:
    """The fast variant in place of PEFT's DoRA; other variants as they are."""
    variant: LoraVariant | None = resolve(layer, **config)
    return FastDora() if type(variant) is DoraLinearVariant else variant


lora.Linear.resolve_lora_variant = fast


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Any:
    """Skip what is missing from the hub's cache, and nothing else."""
    try:
        return (yield)
    except OSError as error:
        if "couldn't connect to 'https://huggingface.co'" in str(error):
            pytest.skip("a model from the hub")
        raise
