from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel
from torch import nn

from hyperopt_peft.adapters import split_parameters
from tests.support.adapted_models import KINDS, bert, dora_bert, single, wrap


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_type_has_one_magnitude_and_two_factors(kind: str) -> None:
    split = split_parameters(single(kind))
    prefix, of = "base_model.model.layer.lora_", "{}.default.weight"
    if kind == "embedding":
        of = "embedding_{}.default"
    assert list(split.magnitudes) == [f"{prefix}magnitude_vector.default.weight"]
    assert list(split.directions) == [prefix + of.format(factor) for factor in "AB"]
    assert split.rest == {}


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


def test_only_the_named_adapter_is_split() -> None:
    model = dora_bert()
    model.add_adapter("other", LoraConfig(target_modules=["key"], use_dora=True, r=3))
    assert all(".default." in name for name in split_parameters(model).magnitudes)
    model.set_adapter("other")
    split = split_parameters(model)
    assert len(split.magnitudes) == 2
    assert all(".key." in name and ".other." in name for name in split.directions)
    with pytest.raises(ValueError, match=r"default.weight: .*set_adapter"):
        split_parameters(model, "default")


def test_error_for_an_adapter_loaded_for_inference(tmp_path: Path) -> None:
    dora_bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.*: .*is_trainable"):
        split_parameters(PeftModel.from_pretrained(bert(), tmp_path))

    model = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    assert len(split_parameters(model).directions) == 8
    next(iter(split_parameters(model).directions.values())).requires_grad_(False)
    with pytest.raises(ValueError, match=r"query\.lora_A\.default\.weight: "):
        split_parameters(model)
