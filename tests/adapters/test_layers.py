from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn

from hyperopt_peft.adapters import dora_layers, gram_penalty, lora_layers
from hyperopt_peft.adapters.layers import (
    base_weight,
    direction,
    magnitude,
    require_plain,
    row_norm,
)
from hyperopt_peft.errors import ProblemError
from tests.support.adapted_models import (
    KINDS,
    Single,
    adapted_layer,
    base_layer,
    bert,
    dora_bert,
    gpt2,
    randomise,
    single,
    token_ids,
    wrap,
)


def rows(weight: torch.Tensor, kind: str) -> torch.Tensor:
    return weight.T if kind in ("conv1d_gpt2", "embedding") else weight.flatten(1)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_merges_the_weight_that_the_direction_defines(kind: str, use_rslora: bool) -> None:
    model = single(kind, use_rslora=use_rslora)
    layer, w0 = adapted_layer(model), rows(base_layer(kind).weight.double(), kind)
    assert torch.equal(base_weight(layer), w0) and torch.equal(direction(layer, "default"), w0)
    torch.testing.assert_close(magnitude(layer, "default"), row_norm(w0))
    randomise(model)
    v, m = direction(layer, "default"), magnitude(layer, "default")
    expected = m[:, None] * v / row_norm(v)[:, None]
    assert expected.shape[0] == {"embedding": 4}.get(kind, 5)

    merged = rows(model.merge_and_unload().layer.weight, kind)
    torch.testing.assert_close(merged, expected)


def test_direction_is_float32_on_a_bfloat16_base_and_under_autocast() -> None:
    model = randomise(single(dtype=torch.bfloat16))
    layer = adapted_layer(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.get_base_layer().weight.double() + 1.5 * b.double() @ a.double()
    with torch.autocast("cpu", torch.bfloat16):
        v = direction(layer, "default")
    assert v.dtype == torch.float32
    torch.testing.assert_close(v.double(), expected, rtol=1e-6, atol=1e-6)


def test_layers_come_in_model_order_with_their_module_names() -> None:
    model = dora_bert()
    names = [name for name, _ in dora_layers(model)]
    prefix = "base_model.model.bert.encoder.layer"
    assert names == [
        f"{prefix}.{i}.attention.self.{target}" for i in (0, 1) for target in ("query", "value")
    ]
    assert all(model.get_submodule(name) is layer for name, layer in dora_layers(model))


def test_an_adapter_can_be_named() -> None:
    model = dora_bert()
    model.add_adapter("other", model.peft_config["default"].__class__(target_modules=["key"]))
    assert len(dora_layers(model, "default")) == 4
    assert [name.rpartition(".")[2] for name, _ in lora_layers(model, "other")] == ["key", "key"]


class QuantisedLinear(nn.Linear):
    """Stands for the many quantised layers that subclass nn.Linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class PackedTensor(torch.Tensor):
    """Stands for torchao's tensors, which report a floating dtype."""


def two_active() -> Any:
    model = single()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    assert len(lora_layers(model, "other")) == 1
    return model


def ia3() -> Any:
    return get_peft_model(bert(), IA3Config(target_modules=["key"], feedforward_modules=[]))


def merged() -> Any:
    model = dora_bert()
    model.merge_adapter()
    return model


def quantised() -> Any:
    return adapted_layer(wrap(Single(QuantisedLinear(4, 5))))


def with_weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    layer = adapted_layer(single())
    base = layer.get_base_layer()
    base.weight = nn.Parameter(change(base.weight.data), requires_grad=False)
    return layer


def convolution(**options: Any) -> Any:
    return adapted_layer(wrap(Single(nn.Conv2d(4, 6, 3, **options))))


def alora() -> Any:
    options = {"use_dora": False, "alora_invocation_tokens": [1]}
    return adapted_layer(wrap(Single(nn.Linear(4, 5)), **options))


def without_a_magnitude() -> Any:
    model = dora_bert()
    lacking = model.base_model.model.bert.encoder.layer[1].attention.self.value
    del lacking.lora_magnitude_vector["default"]
    return model


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd", "ignore:aLoRA is currently")
@pytest.mark.parametrize(
    ("bad", "fragment"),
    [
        (lambda: lora_layers(bert()), r"peft_model: .*BertFor"),
        (lambda: lora_layers(dora_bert(), "other"), r"adapter_name: .*'other'.*default"),
        (lambda: lora_layers(two_active()), r"\['default', 'other'\].*adapter_name"),
        (lambda: lora_layers(ia3()), "adapter 'default'"),
        (lambda: lora_layers(merged()), r"query: .*merged.*'default'"),
        (lambda: dora_layers(dora_bert(use_dora=False)), r"layer\.0.*query: .*use_dora"),
        (lambda: dora_layers(without_a_magnitude()), r"layer\.1\.attention\.self\.value: "),
        (lambda: require_plain(quantised(), "default"), r"lora\.Linear: .*QuantisedLinear"),
        (
            lambda: require_plain(with_weight(lambda w: w.as_subclass(PackedTensor)), "default"),
            r"lora\.Linear: .*W0",
        ),
        (
            lambda: require_plain(with_weight(lambda w: w.to(torch.float8_e4m3fn)), "default"),
            r"lora\.Linear: .*W0",
        ),
        (lambda: require_plain(convolution(groups=2), "default"), "lora.Conv2d: .*groups=2"),
        (lambda: require_plain(convolution(dilation=2), "default"), r"dilation=\(2, 2\)"),
        (
            lambda: require_plain(convolution(padding_mode="circular", padding=1), "default"),
            "padding_mode='circular'",
        ),
        (
            lambda: gram_penalty(wrap(Single(nn.MultiheadAttention(4, 2)), use_dora=False)),
            r"model\.layer: .*MultiheadAttention",
        ),
        (lambda: require_plain(alora(), "default", "here"), r"here: .*Variant .*'default'"),
    ],
)
def test_bad_input_is_named(bad: Callable[[], Any], fragment: str) -> None:
    with pytest.raises(ProblemError, match=fragment):
        bad()


def test_gpt2_layers_have_out_by_in_directions() -> None:
    model = wrap(gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    shapes = {
        name.rpartition("h.0.")[2]: direction(x, "default").shape for name, x in dora_layers(model)
    }
    assert shapes == {"attn.c_attn": (24, 8), "attn.c_proj": (8, 8), "mlp.c_proj": (8, 32)}
    model(token_ids())
