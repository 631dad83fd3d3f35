"""A pytest plugin for PEFT's own tests: each DoRA layer that PEFT makes is a fast one.

A test that asks the hub for a model is skipped, since the tests run offline.
"""

from functools import partial
from typing import Any

import pytest
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraLinearVariant

from hyperopt_peft.adapters.dora.fast import fast_forward
from hyperopt_peft.adapters.dora.variants import ReplacedForward

resolve = lora.Linear.resolve_lora_variant


def fast(layer: lora.Linear, **config: Any) -> Any:
    """PEFT's DoRA with the fast forward pass; other variants as they are."""
    variant: Any = resolve(layer, **config)
    if type(variant) is not DoraLinearVariant:
        return variant
    return ReplacedForward(variant, partial(fast_forward, norm_grad="detach"), "detach")


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
