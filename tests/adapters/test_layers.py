from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from hyperopt_peft.adapters import (
    dora_layers,
    gram_penalty,
    lora_layers,
    set_norm_grad,
    split_parameters,
    use_fast_dora,
)
from hyperopt_peft.adapters.layers import base_weight, direction, magnitude, require_plain
from hyperopt_peft.errors import ProblemError
from tests.support.adapted_models import (
    KINDS,
    Quantised,
    Single,
    adapted_layer,
    base_layer,
    bert,
    dora_bert,
    randomise,
    single,
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
    torch.testing.assert_close(magnitude(layer, "default"), w0.norm(dim=1))
    randomise(model)
    v, m = direction(layer, "default"), magnitude(layer, "default")
    expected = m[:, None] * v / v.norm(dim=1, keepdim=True)
    assert expected.shape[0] == {"embedding": 4}.get(kind, 5)
    split = split_parameters(model)
    assert (len(split.magnitudes), len(split.directions), split.rest) == (1, 2, {})

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


class PackedTensor(torch.Tensor):
    """Stands for torchao's tensors, which report a floating dtype."""


def two_active() -> Any:
    model = single()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    return model


def ia3() -> Any:
    return get_peft_model(bert(), IA3Config(target_modules=["key"], feedforward_modules=[]))


def merged() -> Any:
    model = dora_bert()
    model.merge_adapter()
    return model


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


def plain(layer: Any) -> None:
    require_plain(layer, "default", "here")


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
        (lambda: lora_layers(two_active()), r"\['default', 'other'\].*set_adapter"),
        (lambda: lora_layers(ia3()), "adapter 'default'"),
        (lambda: lora_layers(merged()), r"query: .*merged.*'default'"),
        (lambda: dora_layers(dora_bert(use_dora=False)), r"layer\.0.*query: .*use_dora"),
        (lambda: dora_layers(without_a_magnitude()), r"layer\.1\.attention\.self\.value: "),
        (lambda: use_fast_dora(single(use_dora=False)), r"model\.layer: .*use_dora"),
        *(
            (lambda use=use: use(single(), "none"), "norm_grad: .*'none'")
            for use in (use_fast_dora, set_norm_grad)
        ),
        (lambda: plain(adapted_layer(wrap(Single(Quantised(4, 5))))), "here: .*Quantised"),
        (lambda: plain(with_weight(lambda w: w.as_subclass(PackedTensor))), "here: .*W0"),
        (lambda: plain(with_weight(lambda w: w.to(torch.float8_e4m3fn))), "here: .*W0"),
        (lambda: plain(convolution(groups=2)), "here: .*groups=2"),
        (lambda: plain(convolution(dilation=2)), r"dilation=\(2, 2\)"),
        (
            lambda: plain(convolution(padding_mode="circular", padding=1)),
            "padding_mode='circular'",
        ),
        (
            lambda: gram_penalty(wrap(Single(nn.MultiheadAttention(4, 2)), use_dora=False)),
            r"model\.layer: .*MultiheadAttention",
        ),
        (lambda: plain(alora()), r"here: .*Variant .*'default'"),
    ],
)
def test_bad_input_is_named(bad: Callable[[], Any], fragment: str) -> None:
    with pytest.raises(ProblemError, match=fragment):
        bad()


def test_the_three_groups_partition_the_trainable_parameters_in_model_order() -> None:
    model = dora_bert(target_modules=["query", "value", "word_embeddings"])
    split = split_parameters(model)
    assert (len(split.magnitudes), len(split.directions)) == (5, 10)
    assert list(split.rest) == [
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    ]
    named = dict(model.named_parameters())
    merged = split.magnitudes | split.directions | split.rest
    assert all(named[name] is parameter for name, parameter in merged.items())
    trainable = [name for name, parameter in named.items() if parameter.requires_grad]
    assert sorted(merged) == sorted(trainable)
    order = list(named)
    for group in (split.magnitudes, split.directions, split.rest):
        assert list(group) == sorted(group, key=order.index)


def test_names_of_users_do_not_matter() -> None:
    """Trainable modules of the user's that are called as PEFT's parameters belong to the rest."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.lora_A_head = nn.Linear(3, 3, bias=False)
            self.lora_magnitude_vector_head = nn.Linear(3, 3, bias=False)

    heads = ["lora_A_head", "lora_magnitude_vector_head"]
    split = split_parameters(wrap(Model(), modules_to_save=heads))
    assert (len(split.magnitudes), len(split.directions)) == (1, 2)
    assert list(split.rest) == [
        f"base_model.model.{head}.modules_to_save.default.weight" for head in heads
    ]


def test_only_the_active_adapter_is_split() -> None:
    model = dora_bert()
    model.add_adapter("other", LoraConfig(target_modules=["key"], use_dora=True, r=3))
    assert all(".default." in name for name in split_parameters(model).magnitudes)
    model.set_adapter("other")
    split = split_parameters(model)
    assert len(split.magnitudes) == 2
    assert all(".key." in name and ".other." in name for name in split.directions)


def test_error_for_an_adapter_loaded_for_inference(tmp_path: Path) -> None:
    dora_bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_trainable"):
        split_parameters(PeftModel.from_pretrained(bert(), tmp_path))

    model = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    assert len(split_parameters(model).directions) == 8
    next(iter(split_parameters(model).directions.values())).requires_grad_(False)
    with pytest.raises(ValueError, match=r"query\.lora_A\.default\.weight: "):
        split_parameters(model)
