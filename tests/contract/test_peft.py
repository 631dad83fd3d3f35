"""What PEFT and accelerate do not promise and `peft_internals` uses: a failure names what moved."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import helpers
from peft.tuners.lora import dora
from peft.utils import constants
from torch import nn

from hyperopt_peft.adapters import peft_internals
from hyperopt_peft.cli.text.models import HEADS
from tests.support.adapted_models import KINDS, adapted_layer, layer_input, single

cached = pytest.mark.skipif(not hasattr(helpers, "DoraCaching"), reason="of PEFT 0.19")


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_variant_holds_the_variant_of_a_dora_layer(kind: str) -> None:
    layer = adapted_layer(single(kind))
    assert isinstance(layer.lora_variant, dict)
    variant = layer.lora_variant["default"]
    assert parameters(variant.forward) == peft_internals.PARAMETERS
    peft_internals.require_forward(layer, variant)
    assert peft_internals.variants(layer) == [variant]
    assert not peft_internals.variants(adapted_layer(single(kind, use_dora=False)))


def test_the_names_of_heads() -> None:
    assert set(constants.SEQ_CLS_HEAD_NAMES) == set(HEADS)


@cached
def test_dora_caching_sets_enable_dora_caching_and_fills_dora_cache() -> None:
    model = single().eval()
    layer = adapted_layer(model)
    with helpers.DoraCaching():
        assert dora.ENABLE_DORA_CACHING and peft_internals.is_caching(layer)
        model(layer_input("linear"))
    assert not peft_internals.is_caching(layer)
    cache = layer.lora_magnitude_vector["default"]._dora_cache
    assert set(cache) == {"lora-weight-default", "weight-norm-default"}
    peft_internals.clear_dora_cache(layer, "default")
    assert not cache
    with helpers.DoraCaching():
        assert not peft_internals.is_caching(layer.train())


def test_hf_hook_marks_what_accelerate_has_placed() -> None:
    module = nn.Linear(2, 2)
    assert not peft_internals.is_placed(module)
    add_hook_to_module(module, ModelHook())
    assert "forward" in vars(module) and peft_internals.is_placed(module)
