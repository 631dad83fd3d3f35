"""Weights of rank-1 components: what they compute, the ranks they give, and stock PEFT after."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from hyperopt_peft import ProblemError
from hyperopt_peft.adapters import (
    add_selection,
    component_weights,
    direction,
    lora_layers,
    rank_config,
    selected_ranks,
    selected_state,
    use_fast_dora,
)
from hyperopt_peft.adapters.parametrizations.selection import ComponentWeights
from tests.support.adapted_models import (
    adapted_layer,
    bert,
    layer_input,
    randomise,
    single,
    token_ids,
    wrap,
)

FORMS = ["softmax", "sigmoid"]
KINDS = ["linear", "conv1d_gpt2", "conv1d", "conv2d"]
Q = "bert.encoder.layer.{}.attention.self.query"
V = "bert.encoder.layer.{}.attention.self.value"
LAYERS = [Q.format(0), V.format(0), Q.format(1), V.format(1)]


def lora_bert(**options: Any) -> Any:
    """BERT with LoRA of rank 4 on four layers, away from its start; the head is trained."""
    usual = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "use_dora": False}
    return randomise(wrap(bert(), r=4, lora_alpha=6, **usual | options)).eval()


def set_weights(model: nn.Module, alpha: Any) -> None:
    """Logits from the softmax's weights ``alpha``, a list for each layer."""
    for part, values in zip(component_weights(model).values(), alpha, strict=True):
        with torch.no_grad():
            part.logits.copy_(torch.tensor(values, dtype=torch.float64).log().view_as(part.logits))


def uneven(model: nn.Module, seed: int = 5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for part in component_weights(model).values():
        noise = torch.randn(part.logits.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            part.logits.copy_(noise)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_outputs_are_those_of_lora_bit_by_bit(kind: str, form: str) -> None:
    model, x = randomise(single(kind, use_dora=False, r=3)), layer_input(kind)
    expected = model(x)
    assert torch.equal(add_selection(model, form)(x), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_component_is_multiplied_by_its_weight(kind: str, form: str) -> None:
    model = uneven(add_selection(randomise(single(kind, use_dora=False, r=3)), form))
    x = layer_input(kind)
    (part,) = component_weights(model).values()
    beta = part.logits.flatten()
    alpha = 3 * beta.softmax(0) if form == "softmax" else 2 * beta.sigmoid()
    torch.testing.assert_close(part.weights().flatten(), alpha)

    by_hand = randomise(single(kind, use_dora=False, r=3))
    with torch.no_grad():  # in B, where the library has them in A
        b = adapted_layer(by_hand).lora_B["default"].weight
        b.mul_(alpha.view(1, -1, *[1] * (b.ndim - 2)))
    torch.testing.assert_close(model(x), by_hand(x), rtol=1e-12, atol=1e-12)
    directions = [direction(adapted_layer(m), "default") for m in (model, by_hand)]
    torch.testing.assert_close(*directions, rtol=1e-12, atol=1e-12)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fast", [False, True])
def test_dora_layers_take_weights_too(fast: bool) -> None:
    model, ids = lora_bert(use_dora=True), token_ids()
    expected = model(ids).logits
    assert torch.equal(add_selection(model)(ids).logits, expected)
    searched = uneven(model)
    ranks = dict.fromkeys(LAYERS, 4)
    stock_model = get_peft_model(bert(), rank_config(searched, ranks)).eval()
    set_peft_model_state_dict(stock_model, selected_state(searched, ranks))
    if fast:
        use_fast_dora(searched)
    torch.testing.assert_close(searched(ids).logits, stock_model(ids).logits, rtol=1e-9, atol=1e-9)


def test_a_copied_model_has_weights_of_its_own() -> None:
    model = add_selection(lora_bert())
    twin = uneven(copy.deepcopy(model))
    ids = token_ids()
    assert not torch.equal(model(ids).logits, twin(ids).logits)
    torch.testing.assert_close(model(ids).logits, lora_bert()(ids).logits, rtol=0, atol=0)


def test_ranks_are_counts_of_weights_at_the_threshold() -> None:
    model = add_selection(lora_bert())
    assert selected_ranks(model) == dict.fromkeys(LAYERS, 4)
    # Weights by hand, r = 4: (1.5, 1.5, 0.5, 0.5), (2.5, 0.5, 0.5, 0.5), (1, 1, 1, 1) and
    # (1.2, 1.2, 1.2, 0.4).
    set_weights(model, [[3, 3, 1, 1], [1, 5, 1, 1], [2, 2, 2, 2], [3, 3, 3, 1]])
    assert list(selected_ranks(model).values()) == [2, 1, 4, 3]
    assert list(selected_ranks(model, 1.3).values()) == [2, 1, 0, 0]
    assert list(selected_ranks(model, 0.45).values()) == [4, 4, 4, 3]
    with pytest.raises(ProblemError, match=r"threshold: 3.*2\.5"):
        selected_ranks(model, 3)


def test_a_sigmoid_can_leave_a_layer_nothing() -> None:
    model = add_selection(lora_bert(), "sigmoid")
    for part, beta in zip(component_weights(model).values(), [-1.0, 0.0, 1.0, -0.01], strict=True):
        nn.init.constant_(part.logits, beta)
    assert list(selected_ranks(model).values()) == [0, 4, 4, 0]
    assert list(selected_ranks(model, 0.5).values()) == [4, 4, 4, 4]  # 2/(1 + e) = 0.538


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=64), st.booleans())
def test_a_softmax_leaves_every_layer_a_component(logits: Tensor, equal: Any) -> None:
    part = ComponentWeights(torch.zeros(len(logits), 2), "softmax")
    with torch.no_grad():
        part.logits.copy_(torch.tensor(logits).view(-1, 1))
        if equal:
            part.logits.fill_(logits[0])
        assert part.weights().max() >= 1
        assert not equal or torch.equal(part.weights(), torch.ones_like(part.weights()))
        assert part.weights().mean() == pytest.approx(1, rel=1e-5)


def stock(config: Any, tmp_path: Path, state: Any = None) -> tuple[Any, ...]:
    """A model of ``config``, saved and loaded by PEFT alone, in eval mode; and before that."""
    model = get_peft_model(bert(), config)
    if state is not None:
        result = set_peft_model_state_dict(model, state)
        assert not result.unexpected_keys
    model.save_pretrained(tmp_path)
    return PeftModel.from_pretrained(bert(), tmp_path).eval(), model.eval()


RANKS = dict(zip(LAYERS, [3, 0, 4, 1], strict=True))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized")
def test_the_config_gives_each_layer_its_rank_and_scale(tmp_path: Path, rslora: bool) -> None:
    searched = add_selection(lora_bert(use_rslora=rslora))
    scale, wanted = 6 / 2 if rslora else 6 / 4, {n: r for n, r in RANKS.items() if r}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*did not match.*")
        models = stock(rank_config(searched, RANKS), tmp_path)
    for model in models:
        found = {n.removeprefix("base_model.model."): x for n, x in lora_layers(model)}
        assert {n: x.r["default"] for n, x in found.items()} == {
            n: r for n, r in RANKS.items() if r
        }
        assert [x.scaling["default"] for x in found.values()] == pytest.approx([scale] * 3)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ranks = {k.split(".lora_A")[0]: len(v) for k, v in tensors.items() if "lora_A" in k}
    assert ranks == {f"base_model.model.{n}": r for n, r in wanted.items()}


class Nested(nn.Module):
    """A layer whose name is the end of another's name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.block = nn.Linear(4, 4), nn.ModuleDict({"layer": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Any:
        return self.block["layer"](self.layer(x))


def test_a_rank_is_that_of_one_layer_only() -> None:
    model = wrap(Nested(), use_dora=False, r=4)
    wanted = {"layer": 1, "block.layer": 3}
    again = get_peft_model(Nested(), rank_config(model, wanted))
    found = {n.removeprefix("base_model.model."): x.r["default"] for n, x in lora_layers(again)}
    assert found == wanted


def test_with_all_components_the_state_is_the_searched_function(tmp_path: Path) -> None:
    searched, ids = uneven(add_selection(lora_bert())), token_ids()
    ranks = dict.fromkeys(LAYERS, 4)
    state = selected_state(searched, ranks)
    for model in stock(rank_config(searched, ranks), tmp_path, state):
        torch.testing.assert_close(model(ids).logits, searched(ids).logits, rtol=1e-10, atol=1e-10)


def test_the_state_keeps_the_largest_weights(tmp_path: Path) -> None:
    searched, ids = uneven(add_selection(lora_bert())), token_ids()
    state = selected_state(searched, RANKS)
    # The same function as without the columns of B that go with the others.
    layers = dict(lora_layers(searched))
    for name, part in component_weights(searched).items():
        dropped = part.weights().flatten().argsort(descending=True)[RANKS[name] :]
        with torch.no_grad():
            layers[f"base_model.model.{name}"].lora_B["default"].weight[:, dropped] = 0
    expected = searched(ids).logits
    for model in stock(rank_config(searched, RANKS), tmp_path, state):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"),
    reason="PEFT before 0.21 puts the adapter's name twice into the keys of parametrizations",
)
def test_a_search_is_saved_and_loaded_with_its_weights(tmp_path: Path) -> None:
    searched, ids = uneven(add_selection(lora_bert())), token_ids()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT 0.18 says so of every model that is not of the hub.
        warnings.filterwarnings("ignore", "Could not find a config file")
        searched.save_pretrained(tmp_path)
    again = add_selection(lora_bert())
    result = set_peft_model_state_dict(again, load_file(tmp_path / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    assert torch.equal(again(ids).logits, searched(ids).logits)


def plain() -> Any:
    return lora_bert()


def embedding() -> Any:
    return single("embedding", use_dora=False)


def frozen(model: nn.Module) -> Any:
    model.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: add_selection(bert()), "peft_model: "),
        (lambda: add_selection(embedding()), "layer: Embedding"),
        (lambda: add_selection(add_selection(plain())), "add_selection"),
        (lambda: add_selection(frozen(plain())), "is_trainable"),
        (lambda: add_selection(plain(), "tanh"), "form: .*'tanh'"),
        (lambda: selected_ranks(plain()), "add_selection"),
        (lambda: selected_state(plain(), RANKS), "add_selection"),
        (lambda: selected_state(embedding(), {"layer": 1}), "add_selection"),
        (lambda: rank_config(plain(), {LAYERS[0]: 1}), "ranks: .*layer.1.*query"),
        (lambda: rank_config(plain(), RANKS | {LAYERS[0]: -1}), "ranks: .*-1"),
        (lambda: rank_config(plain(), RANKS | {LAYERS[0]: 1.5}), "ranks: .*1.5"),
        (lambda: rank_config(plain(), dict.fromkeys(LAYERS, 0)), "ranks: "),
        (
            lambda: selected_state(add_selection(plain()), RANKS | {LAYERS[0]: 5}),
            "ranks: .*5",
        ),
    ],
)
def test_bad_input_is_named(wrong: Callable[..., Any], said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        wrong()


def test_an_adapter_without_lora_layers_is_named() -> None:
    model = get_peft_model(
        bert(), IA3Config(target_modules=["query"], feedforward_modules=[], task_type="SEQ_CLS")
    )
    with pytest.raises(ProblemError, match="adapter 'default'"):
        add_selection(model)


def test_only_the_named_adapter_gets_weights() -> None:
    model = lora_bert()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["value"], task_type="SEQ_CLS"))
    model.set_adapter("other")
    add_selection(randomise(model), adapter_name="other")
    assert list(component_weights(model)) == [V.format(0), V.format(1)]
    ranks = {V.format(0): 1, V.format(1): 2}
    assert selected_ranks(uneven(model), 0.0, "other") == dict.fromkeys(ranks, 2)
    config = rank_config(model, ranks, "other")
    state = selected_state(model, ranks, "other")
    assert config.target_modules == set(ranks) and config.r == 2
    layers = dict(lora_layers(model, "other"))
    for name, part in component_weights(model, "other").items():
        a = layers[f"base_model.model.{name}"].lora_A["other"].weight
        kept = part.weights().flatten().topk(ranks[name]).indices.sort().values
        found = state[f"base_model.model.{name}.lora_A.weight"]
        assert torch.equal(found, a[kept]) and not found.requires_grad
        b = layers[f"base_model.model.{name}"].lora_B["other"].weight
        assert torch.equal(state[f"base_model.model.{name}.lora_B.weight"], b[:, kept])
    with pytest.raises(ProblemError, match="add_selection"):
        component_weights(model, "default")
