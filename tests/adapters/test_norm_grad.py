from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import variants
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from hyperopt_peft.adapters import dora_layers, set_norm_grad, use_fast_dora
from tests.support.adapted_models import (
    KINDS,
    Single,
    adapted_layer,
    adapter_parameters,
    layer_input,
    output_and_gradients,
    randomise,
    single,
    tokens,
    wrap,
)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_bfloat16_base_with_float32_adapter(kind: str) -> None:
    model = randomise(single(kind, dtype=torch.bfloat16, lora_dropout=0.3)).train()
    dtypes = {p.dtype for _, p in adapter_parameters(model)}
    assert dtypes == {torch.float32}
    x = layer_input(kind, torch.bfloat16)
    outputs = []
    for norm_grad in ("detach", "full"):
        set_norm_grad(model, norm_grad)
        torch.manual_seed(0)
        outputs.append(model(x))
    assert outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(*outputs, rtol=2**-7, atol=1e-6)


def test_scaled_embeddings_keep_their_scale() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    embedding = Gemma3TextScaledWordEmbedding(7, 4, padding_idx=0, embed_scale=3.0).double()
    model = randomise(wrap(Single(embedding)))
    x = layer_input("embedding")
    expected = model(x)
    torch.testing.assert_close(set_norm_grad(model)(x), expected, rtol=1e-12, atol=1e-12)


def as_function(model: PeftModel, x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The output as a function of (A, B, m), a bias, and, where it is continuous, of x."""
    trained = dict(adapter_parameters(model))
    trained |= {n: p.requires_grad_() for n, p in model.named_parameters() if n.endswith("bias")}
    leaves = [p.detach().clone().requires_grad_() for p in trained.values()]
    if x.is_floating_point():
        leaves.append(x.clone().requires_grad_())

    def function(*values: Tensor) -> Tensor:
        argument = values[-1] if x.is_floating_point() else x
        torch.manual_seed(0)
        return functional_call(model, dict(zip(trained, values, strict=False)), (argument,))

    return function, tuple(leaves)


@pytest.mark.parametrize(
    ("use", "kind", "x", "dropout", "crossing"),
    [
        *((set_norm_grad, kind, layer_input(kind)[:1], 0.3, False) for kind in KINDS),
        (use_fast_dora, "linear", tokens(2), 0.3, True),
        (use_fast_dora, "linear", tokens(7), 0.0, True),
        (use_fast_dora, "conv1d_gpt2", tokens(2), 0.3, False),
    ],
)
def test_both_derivatives(use: Any, kind: str, x: Tensor, dropout: float, crossing: bool) -> None:
    """Also of magnitudes that cross zero."""
    model = use(randomise(single(kind, lora_dropout=dropout))).train()
    if crossing:
        with torch.no_grad():
            adapted_layer(model).lora_magnitude_vector["default"].weight[:3].copy_(
                torch.tensor([0.0, 1e-9, -0.4])
            )
    function, inputs = as_function(model, x)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_draws_are_those_of_peft(kind: str, dropout: float) -> None:
    model, x = randomise(single(kind, lora_dropout=dropout)).train(), layer_input(kind)
    original = type(adapted_layer(model).lora_variant["default"])
    expected, state = output_and_gradients(model, x), torch.get_rng_state()

    assert set_norm_grad(model, "full") is model
    assert type(adapted_layer(model).lora_variant["default"]) is not original
    full = output_and_gradients(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(full["output"], expected["output"], rtol=1e-12, atol=1e-12)
    assert any(not torch.allclose(full[name], expected[name]) for name in expected)

    set_norm_grad(model, "detach")
    assert type(adapted_layer(model).lora_variant["default"]) is original
    again = output_and_gradients(model, x)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_only_the_active_adapter_changes() -> None:
    model = single()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    set_norm_grad(model)
    chosen = adapted_layer(model).lora_variant
    assert type(chosen["default"]) is variants.DoraLinearVariant
    assert type(chosen["other"]) is not variants.DoraLinearVariant


#: PEFT before 0.21 cannot take out again what it has merged into GPT-2's layer.
unmerged = pytest.mark.skipif(peft.__version__ < "0.21", reason="PEFT's own unmerging")


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        *((kind, set_norm_grad) for kind in KINDS if kind != "conv1d_gpt2"),
        pytest.param("conv1d_gpt2", set_norm_grad, marks=unmerged),
        ("linear", use_fast_dora),
    ],
)
def test_merging_and_unmerging_stay_exact(kind: str, use: Any) -> None:
    model, x = use(randomise(single(kind))), layer_input(kind)
    expected, w0 = model(x), adapted_layer(model).get_base_layer().weight.clone()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    model.unmerge_adapter()
    torch.testing.assert_close(adapted_layer(model).get_base_layer().weight, w0)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_error_names_the_unsupported_module_and_changes_no_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 6, 3)
            self.grouped = nn.Conv2d(4, 6, 3, groups=2)

    model = wrap(Model(), target_modules=["first", "grouped"])
    with pytest.raises(ValueError, match=r"base_model\.model\.grouped: "):
        set_norm_grad(model)
    layers = dict(dora_layers(model))
    first = layers["base_model.model.first"].lora_variant["default"]
    assert type(first) is variants.DoraConv2dVariant
    assert set_norm_grad(model, "detach") is model
