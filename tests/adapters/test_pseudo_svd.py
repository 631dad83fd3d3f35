"""P Λ Q in place of B A: the same function, plain files, and PEFT's own merging."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from hyperopt_peft import ProblemError
from hyperopt_peft.adapters import (
    gram_penalty,
    orthogonality_penalty,
    pseudo_singular_values,
    use_pseudo_svd,
)
from hyperopt_peft.adapters.layers import direction
from tests.support.adapted_models import (
    adapted_layer,
    dora_bert,
    gpt2,
    layer_input,
    randomise,
    single,
    token_ids,
    wrap,
)

KINDS = ("linear", "conv1d_gpt2", "conv1d", "conv2d", "conv3d")


def lora(kind: str = "linear", **options: Any) -> Any:
    return single(kind, use_dora=False, **options)


def parts(model: nn.Module) -> tuple[Any, ...]:
    """P (out, r), λ (r,) and Q (r, in) of the model's one layer."""
    layer = adapted_layer(model)
    b, a = layer.lora_B["default"].parametrizations.weight, layer.lora_A["default"].weight
    p, values = b.original0.detach(), b.original1.detach()
    return p.flatten(1), values, a.detach().flatten(1)


def assert_orthonormal(p: Any, q: Any) -> None:
    identity = torch.eye(len(q), dtype=q.dtype)
    torch.testing.assert_close(p.T @ p, identity)
    torch.testing.assert_close(q @ q.T, identity)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_starts_at_the_pretrained_model(kind: str) -> None:
    model, x = lora(kind), layer_input(kind)
    expected = model(x)
    use_pseudo_svd(model)
    assert torch.equal(model(x), expected)
    p, values, q = parts(model)
    assert torch.equal(values, torch.zeros_like(values))
    assert_orthonormal(p, q)
    assert float(orthogonality_penalty(model)) < 1e-25
    # It can move: ∂/∂λ does not vanish with λ.
    model(x).sin().sum().backward()
    assert all((v.grad != 0).all() for v in pseudo_singular_values(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_is_decomposed(kind: str) -> None:
    model, x = randomise(lora(kind)), layer_input(kind)
    layer = adapted_layer(model)
    expected, v = model(x), direction(layer, "default")
    a, b = (m["default"].weight.detach().flatten(1) for m in (layer.lora_A, layer.lora_B))
    singular = torch.linalg.svdvals(b @ a)[:2]
    use_pseudo_svd(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(direction(layer, "default"), v)
    p, values, q = parts(model)
    torch.testing.assert_close(values, singular)
    assert_orthonormal(p, q)
    p, values, q = parts(randomise(model))
    update = layer.get_delta_weight("default")
    update = update.T if kind == "conv1d_gpt2" else update.flatten(1)
    torch.testing.assert_close(update, 3 / 2 * p @ torch.diag(values) @ q)


def test_penalty_is_its_formula() -> None:
    model = randomise(use_pseudo_svd(lora("conv2d")))
    p, _, q = parts(model)
    identity = torch.eye(2, dtype=p.dtype)
    expected = (p.T @ p - identity).norm() ** 2 + (q @ q.T - identity).norm() ** 2
    torch.testing.assert_close(orthogonality_penalty(model).detach(), expected)


def test_penalty_is_the_sum_over_layers_in_float32() -> None:
    model = use_pseudo_svd(dora_bert(use_dora=False, dtype=torch.bfloat16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or name.endswith("original0"):
                parameter.zero_()
    penalty = orthogonality_penalty(model)
    assert penalty.dtype == torch.float32
    assert float(penalty) == 4 * (2 + 2)  # ‖0 − I‖² = r, twice a layer
    expected = orthogonality_penalty(copy.deepcopy(randomise(model)).double()).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(orthogonality_penalty(model), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_adapter_is_plain_lora(kind: str, tmp_path: Path) -> None:
    model, x = randomise(use_pseudo_svd(lora(kind))), layer_input(kind)
    expected = model(x)
    saved = get_peft_model_state_dict(model)
    plain = get_peft_model_state_dict(lora(kind))
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in plain.items()}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(lora(kind).unload(), tmp_path, is_trainable=True)
    assert torch.equal(again(x), expected)
    torch.testing.assert_close(use_pseudo_svd(again)(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_a_state_dict_returns() -> None:
    """With columns of P that are unit vectors and λ ≥ 0, P Λ is taken apart exactly."""
    model = use_pseudo_svd(randomise(lora()))
    assert list(adapted_layer(model).lora_B["default"].state_dict()) == ["weight"]
    other = use_pseudo_svd(lora())
    assert not other.load_state_dict(model.state_dict()).missing_keys
    for one, two in zip(parts(other), parts(model)):
        torch.testing.assert_close(one, two)
    with torch.no_grad():
        next(iter(pseudo_singular_values(model).values()))[1] = 0
    other.load_state_dict(model.state_dict())  # a zero column of B gets a direction
    p, values, _ = parts(other)
    assert values[1] == 0
    torch.testing.assert_close(p.norm(dim=0), torch.ones(2, dtype=p.dtype))


def test_copies_are_apart() -> None:
    model, x = randomise(use_pseudo_svd(lora())), layer_input("linear")
    twin, expected = copy.deepcopy(model), model(x)
    randomise(twin, seed=4)
    assert not torch.allclose(twin(x), expected)
    assert torch.equal(model(x), expected)


def test_gpt2_and_the_other_penalty() -> None:
    """Conv1D layers in a whole model; functions that read V see P Λ Q."""
    model = wrap(gpt2(), target_modules=["c_attn"], use_dora=False, fan_in_fan_out=True)
    randomise(model).eval()
    ids = token_ids()
    expected, gram = model(ids).logits, gram_penalty(model)
    use_pseudo_svd(model)
    torch.testing.assert_close(model(ids).logits, expected)
    torch.testing.assert_close(gram_penalty(model), gram)


def parameter_adapter() -> Any:
    model = nn.Module()
    model.layer = nn.Linear(4, 5)
    options = {"target_modules": [], "target_parameters": ["layer.weight"], "use_dora": False}
    adapted = wrap(model, **options)
    assert isinstance(adapted_layer(adapted), ParamWrapper)
    return adapted


def frozen() -> Any:
    model = lora()
    model.base_model.set_requires_grad("default", False)
    return model


def merged() -> Any:
    model = randomise(lora())
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: use_pseudo_svd(nn.Linear(2, 2)), "peft_model: "),
        (lambda: use_pseudo_svd(single()), "DoraLinearVariant.*use_dora"),
        (lambda: use_pseudo_svd(lora("embedding")), r"lora\.Embedding"),
        (lambda: use_pseudo_svd(parameter_adapter()), "ParamWrapper"),
        (lambda: use_pseudo_svd(lora(r=5)), "rank 5"),
        (lambda: use_pseudo_svd(frozen()), "is_trainable"),
        (lambda: use_pseudo_svd(merged()), "unmerge_adapter"),
        (lambda: use_pseudo_svd(use_pseudo_svd(lora())), "use_pseudo_svd"),
        (lambda: use_pseudo_svd(lora(), "other"), "adapter_name: .*'other'"),
        (lambda: pseudo_singular_values(lora()), "use_pseudo_svd"),
        (lambda: orthogonality_penalty(lora("embedding")), "use_pseudo_svd"),
    ],
)
def test_bad_input_is_named(wrong: Callable[..., Any], said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        wrong()


def test_a_refused_model_is_unchanged() -> None:
    """The last layer is refused; none before it has been changed."""
    model = dora_bert(use_dora=False, target_modules=["query", "value", "word_embeddings"])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ProblemError):
        use_pseudo_svd(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
