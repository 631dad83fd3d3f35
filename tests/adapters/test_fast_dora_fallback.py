"""Where the fast layer is not the layer it stands for, that one is used."""

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, helpers
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from hyperopt_peft.adapters import set_norm_grad, use_fast_dora
from tests.support.adapted_models import (
    Quantised,
    Single,
    adapted_layer,
    assert_same,
    output_and_gradients,
    randomise,
    single,
    tokens,
    wrap,
)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_on_the_base_layer_is_honoured(everywhere: bool) -> None:
    model, x = randomise(single()), tokens(3)
    base, seen = adapted_layer(model).get_base_layer(), []

    def double(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if module is not base:
            return None
        seen.append((output, output.clone()))
        return output * 2

    register = nn.modules.module.register_module_forward_hook
    with register(double) if everywhere else base.register_forward_hook(double):
        expected = set_norm_grad(model)(x)
        torch.testing.assert_close(use_fast_dora(model)(x), expected)
    assert all(torch.equal(output, copied) for output, copied in seen)


def test_an_unreadable_layer_keeps_the_forward_of_peft_and_says_so_once() -> None:
    torch.manual_seed(0)
    model = randomise(wrap(Single(Quantised(4, 5).double())))
    expected = output_and_gradients(model, tokens(3))
    with pytest.warns(UserWarning, match=r"base_model\.model\.layer") as caught:
        use_fast_dora(model)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(output_and_gradients(model, tokens(3)), expected, 0)


def test_weights_that_are_elsewhere_at_the_time_keep_the_forward_of_peft() -> None:
    model = use_fast_dora(randomise(single())).eval()
    layer, x = adapted_layer(model), tokens(3)
    expected = model(x)

    class Sharded(Tensor):
        """A weight that is of another kind than a plain tensor."""

    weight = layer.get_base_layer().weight
    layer.get_base_layer()._parameters["weight"] = weight.detach().as_subclass(Sharded)
    with pytest.warns(UserWarning, match=r"lora\.Linear"):
        torch.testing.assert_close(model(x).as_subclass(Tensor), expected)


def slopes(model: PeftModel, x: Tensor) -> tuple[Tensor, ...]:
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    return torch.autograd.grad(model(x).sin().sum(), trained)


def of_base_weight(model: PeftModel, x: Tensor) -> tuple[Tensor, ...]:
    adapted_layer(model).get_base_layer().weight.requires_grad_()
    return slopes(model, x)


def in_a_hook(model: PeftModel, x: Tensor) -> Tensor:
    """What a backward hook of the base layer gets."""
    layer, seen = adapted_layer(model).get_base_layer(), []
    with layer.register_full_backward_hook(lambda _module, _in, out: seen.append(out[0].clone())):
        model(x.clone().requires_grad_()).sin().sum().backward()
    (found,) = seen
    return found


def transformed(model: PeftModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """A Jacobian in B and a map over tokens, by transforms of functions."""
    name = "base_model.model.layer.lora_B.default.weight"
    b = {name: model.get_parameter(name)}

    def outputs(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,))

    jacobian = torch.func.jacrev(outputs)(b, x[0])[name]
    return jacobian, torch.func.vmap(outputs, (None, 0))(b, x[0])


def directional(model: PeftModel, x: Tensor) -> tuple[Tensor, ...]:
    """The derivative of the output along ones, in A, B, m and x at once, in forward mode."""
    with forward_ad.dual_level():
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        duals = {n: forward_ad.make_dual(p, torch.ones_like(p)) for n, p in trained.items()}
        y = functional_call(model, duals, (forward_ad.make_dual(x, torch.ones_like(x)),))
        return forward_ad.unpack_dual(y)


@pytest.mark.parametrize(
    ("observe", "options"),
    [
        (slopes, {"bias": "all"}),
        *((each, {}) for each in (of_base_weight, in_a_hook, transformed, directional)),
    ],
)
def test_what_needs_plain_operations_has_them(observe: Any, options: dict[str, Any]) -> None:
    model, x = randomise(wrap(Single(nn.Linear(4, 5).double()), **options)), tokens(20)
    expected = observe(set_norm_grad(model), x)
    torch.testing.assert_close(observe(use_fast_dora(model), x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(not hasattr(helpers, "DoraCaching"), reason="of PEFT 0.19")
@pytest.mark.parametrize("norm_grad", ["full", "detach"])
def test_caching_at_inference_is_that_of_peft(norm_grad: Any) -> None:
    """Every pass of the same sequence as PEFT's; gradients are those without caching."""
    model, x = randomise(single()).eval(), tokens(3)
    b = adapted_layer(model).lora_B["default"].weight
    start, outputs = b.detach().clone(), []
    for prepare in (set_norm_grad, use_fast_dora):
        prepare(model, "detach" if prepare is set_norm_grad else norm_grad)
        with torch.no_grad():
            b.copy_(start)
            for caching in (True, True, False, True, True):
                with helpers.DoraCaching(caching):
                    outputs.append(model(x))
                b.mul_(2)
            b.copy_(start)
    torch.testing.assert_close(outputs[5:], outputs[:5])
    assert not torch.allclose(outputs[2], outputs[1])  # the second is from the cache
    assert not torch.allclose(outputs[3], outputs[2])  # the fourth is not
    expected = output_and_gradients(set_norm_grad(model, norm_grad), x)
    with helpers.DoraCaching():
        assert_same(output_and_gradients(use_fast_dora(model, norm_grad), x), expected, 1e-12)


def test_a_base_weight_that_is_wider_than_the_adapter() -> None:
    """W0 in float64 and the adapter in float32."""
    model, reference = randomise(single()), randomise(single())
    for p in (p for n, p in model.named_parameters() if "lora_" in n):
        p.data = p.data.float()
    with torch.no_grad():
        for p, q in zip(reference.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    x = tokens(5)
    actual = use_fast_dora(model)(x)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, set_norm_grad(reference)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora_B.default.weight", "base_layer.weight"])
def test_a_write_that_autograd_does_not_see_counts(name: str) -> None:
    """8-bit optimizers write behind autograd's back: the version does not move."""
    model, x = use_fast_dora(randomise(single())), tokens(3)
    model(x)
    adapted_layer(model).get_parameter(name).data.mul_(2)
    actual = model(x)
    torch.testing.assert_close(actual, set_norm_grad(model)(x), rtol=1e-12, atol=1e-12)


def test_norms_of_inference_mode_enter_no_graph() -> None:
    model, x = use_fast_dora(randomise(single())), tokens(3)
    expected = output_and_gradients(model, x)
    with torch.inference_mode():
        inside = model(x).clone()
    assert_same(output_and_gradients(model, x), expected, 0)
    torch.testing.assert_close(inside, expected["output"])
