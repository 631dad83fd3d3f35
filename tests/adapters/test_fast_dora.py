"""The fast layer against PEFT's, the closed form and autograd."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import variants
from torch import Tensor, nn

from hyperopt_peft.adapters import dora_layers, set_norm_grad, use_fast_dora
from hyperopt_peft.adapters.dora.fast import fast_forward
from tests.support.adapted_models import (
    Single,
    adapted_layer,
    adapter_parameters,
    assert_same,
    base_layer,
    bert,
    dora_bert,
    gpt2,
    layer_input,
    output_and_gradients,
    randomise,
    single,
    token_ids,
    tokens,
    wrap,
)

LINEAR = ("linear", "conv1d_gpt2")
MODES: tuple[Any, ...] = ("full", "detach")


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("norm_grad", MODES)
@pytest.mark.parametrize(
    ("kind", "count"),  # of tokens, below and above where g ∘ V is formed
    [*((kind, count) for kind in LINEAR for count in (1, 3, 40)), ("conv2d", 3), ("embedding", 3)],
)
def test_it_equals_the_plain_layer(kind: str, norm_grad: Any, count: int, dropout: float) -> None:
    model = randomise(single(kind, lora_dropout=dropout)).train()
    x = tokens(count) if kind in LINEAR else layer_input(kind)
    expected = output_and_gradients(set_norm_grad(model, norm_grad), x)
    state = torch.get_rng_state()
    actual = output_and_gradients(use_fast_dora(model, norm_grad), x)
    assert_same(actual, expected, 1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    forward = adapted_layer(model).lora_variant["default"].forward
    assert (getattr(forward, "func", None) is fast_forward) == (kind in LINEAR)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (6, 4), (2, 1, 3, 4), (0, 4)])
def test_any_input_shape(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = randomise(wrap(Single(nn.Linear(4, 5, bias=bias).double())))
    x = torch.randn(shape, dtype=torch.float64)
    expected = model(x).view(*shape[:-1], 5)  # PEFT adds an axis to a single vector
    torch.testing.assert_close(use_fast_dora(model)(x), expected, rtol=1e-12, atol=1e-12)
    assert use_fast_dora(model)(x.mT.contiguous().mT if x.dim() > 1 else x).shape == expected.shape


@pytest.mark.parametrize("left", [1.0, 1e-2, 1e-6])
@pytest.mark.parametrize("norm_grad", MODES)
def test_rows_that_nearly_cancel(norm_grad: Any, left: float) -> None:
    """W0 + s·B·A keeps a share `left` of one row of W0; float32 against float64."""
    model = single(r=4, lora_alpha=4)
    layer = adapted_layer(randomise(model))
    with torch.no_grad():
        w0 = layer.get_base_layer().weight
        layer.lora_A["default"].weight.copy_(torch.eye(4))
        layer.lora_B["default"].weight[1] = (left - 1) * w0[1] + left * torch.randn(4).double()
    single_precision = copy.deepcopy(model).float()
    for name, p in model.named_parameters():  # the same numbers in both precisions
        p.data = dict(single_precision.named_parameters())[name].data.double()
    exact = output_and_gradients(set_norm_grad(model, norm_grad), tokens(20))
    x = tokens(20, dtype=torch.float32)
    peft = output_and_gradients(set_norm_grad(single_precision, norm_grad), x)
    fast = output_and_gradients(use_fast_dora(single_precision, norm_grad), x)
    for name, truth in exact.items():
        error, least = ((run[name].double() - truth).norm() for run in (fast, peft))
        assert error <= 8 * least + 1e-5 * truth.norm(), name


def test_the_norm_of_a_row_that_is_zero_is_not_a_division_by_zero() -> None:
    model = single()
    with torch.no_grad():
        adapted_layer(model).get_base_layer().weight[1] = 0
        adapted_layer(model).lora_magnitude_vector["default"].weight[1] = 0
    values = output_and_gradients(use_fast_dora(model), tokens(20))
    bias = adapted_layer(model).get_base_layer().bias
    torch.testing.assert_close(values["output"][..., 1], bias[1].expand(2, 20))


@pytest.mark.parametrize("norm_grad", MODES)
@pytest.mark.parametrize(
    ("base", "adapter", "dropout"),
    [
        (torch.bfloat16, torch.float32, 0.0),
        (torch.bfloat16, torch.bfloat16, 0.3),
        (torch.float32, torch.float32, 0.0),  # with autocast
        (torch.float32, torch.float32, 0.3),
    ],
)
def test_low_precision_is_as_exact_as_peft(
    base: torch.dtype, adapter: torch.dtype, dropout: float, norm_grad: Any
) -> None:
    torch.manual_seed(0)
    model = wrap(Single(nn.Linear(64, 48).to(base)), lora_dropout=dropout).train()
    for _, p in adapter_parameters(model):
        p.data = p.data.to(adapter)
    randomise(model)
    x, autocast = tokens(100, 64, base), base == torch.float32
    truth = set_norm_grad(copy.deepcopy(model).double(), norm_grad)
    exact = output_and_gradients(truth, x.double())
    peft = output_and_gradients(set_norm_grad(model, norm_grad), x, autocast)
    fast = output_and_gradients(use_fast_dora(model, norm_grad), x, autocast)
    for name, truth in exact.items():
        assert fast[name].dtype == peft[name].dtype
        if dropout:  # float64 draws other masks: only the two of equal precision are comparable
            truth = peft[name].double()
            assert (fast[name].double() - truth).norm() <= 2e-2 * truth.norm(), name
        else:
            error, least = ((run[name].double() - truth).norm() for run in (fast, peft))
            assert error <= 1.5 * least + 2e-3 * truth.norm(), name


@pytest.mark.parametrize("norm_grad", MODES)
def test_whole_models_and_checkpointing(norm_grad: Any) -> None:
    generator = wrap(gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    encoder = dora_bert(lora_dropout=0.2, target_modules="all-linear").train()
    for model in (randomise(generator), randomise(encoder)):
        expected = output_and_gradients(set_norm_grad(model, norm_grad), token_ids())
        actual = output_and_gradients(use_fast_dora(model, norm_grad), token_ids())
        assert_same(actual, expected, 1e-11)
    encoder.enable_input_require_grads()
    encoder.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(output_and_gradients(encoder, token_ids()), actual, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_on_the_meta_device_are_those_of_the_layer(dtype: torch.dtype) -> None:
    """Where there are no numbers to read back; under autocast too."""
    ends = []
    for device in ("cpu", "meta"):
        model = use_fast_dora(wrap(Single(nn.Linear(4, 5))).to(device)).train()
        inside = [parameter for _, parameter in adapter_parameters(model)]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = model(torch.ones(3, 4, device=device))
        gradients = torch.autograd.grad(y.float().sum(), inside)
        ends.append([y.shape, *((x.shape, x.dtype) for x in gradients)])
    assert ends[0] == ends[1]


def test_saving_loading_and_unloading(tmp_path: Path) -> None:
    """What is saved is a plain adapter, of the same names; nothing is warned of."""
    model = randomise(dora_bert()).eval()
    names = list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_fast_dora(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    kinds = {type(layer.lora_variant["default"]) for _, layer in dora_layers(loaded)}
    assert kinds == {variants.DoraLinearVariant}
    expected = model(token_ids()).logits
    torch.testing.assert_close(loaded(token_ids()).logits, expected, rtol=1e-12, atol=1e-12)
    merged = model.merge_and_unload()(token_ids()).logits
    torch.testing.assert_close(merged, expected, rtol=1e-11, atol=1e-11)


def test_adapters_in_turn_and_together() -> None:
    model, x = randomise(single()), tokens(3)
    model.add_adapter("other", model.peft_config["default"])
    randomise(model, seed=9)
    choices: list[Any] = ["default", "other", ["default", "other"], "default"]
    expected = []
    for fast in (False, True):
        for name in ("default", "other") if fast else ():
            model.set_adapter(name)
            use_fast_dora(model)
        for k, choice in enumerate(choices):
            model.base_model.set_adapter(choice)
            if fast:
                torch.testing.assert_close(model(x), expected[k], rtol=1e-12, atol=1e-12)
            else:
                expected.append(model(x))
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base_layer("linear").double()(x))


def saved_shapes(model: PeftModel, x: Tensor) -> list[tuple[int, ...]]:
    """The shapes of what a forward pass saves, parameters and repetitions apart."""
    parameters = {p.data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sorted(tuple(t.shape) for t in saved.values() if t.numel() >= x.shape[-2])


def test_the_layer_saves_its_input_and_output_only() -> None:
    count, columns, rows, rank = 50, 6, 7, 2
    torch.manual_seed(0)
    x = torch.randn(count, columns, requires_grad=True)
    for dropout, more in ((0.0, []), (0.5, [(count, columns)])):
        model = wrap(Single(nn.Linear(columns, rows)), lora_dropout=dropout).train()
        expected = [(rank, count), (count, columns), (count, rows), *more]
        assert saved_shapes(use_fast_dora(model), x) == sorted(expected)


def test_a_pass_over_magnitudes_computes_no_gradient_of_the_factors() -> None:
    """Products with dy: ∂L/∂x alone, then two more for A and one more for B."""
    model, x = use_fast_dora(randomise(single()), "detach"), tokens(40).requires_grad_()
    layer = adapted_layer(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    m = layer.lora_magnitude_vector["default"].weight

    def products(wanted: list[Tensor]) -> int:
        loss = model(x).sin().sum()
        with torch.profiler.profile() as profile:
            loss.backward(inputs=wanted)
        names = [event.name for event in profile.events()]
        return names.count("aten::mm") + names.count("aten::addmm")

    assert products([m]) == 0
    assert products([b]) == 1
    assert products([a]) == 2
    assert products([a, b, m]) == 3
