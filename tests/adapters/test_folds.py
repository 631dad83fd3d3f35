"""Copies of an adapter for the folds of a cross-fitted program, over one base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from hyperopt_peft import Problem, ProblemError, cross_fit, hypergradient
from hyperopt_peft.adapters import (
    AdapterFolds,
    add_selection,
    component_weights,
    pseudo_singular_values,
    set_norm_grad,
    split_parameters,
    use_fast_dora,
    use_pseudo_svd,
)
from tests.support.adapted_models import (
    KINDS,
    Single,
    bert,
    dora_bert,
    layer_input,
    randomise,
    single,
    token_ids,
    wrap,
)

MAKERS: dict[str, Any] = {
    "lora": lambda: dora_bert(use_dora=False),
    "dora": dora_bert,
    "norm in the graph": lambda: set_norm_grad(dora_bert()),
    "fast dora": lambda: use_fast_dora(dora_bert()),
    "singular values": lambda: use_pseudo_svd(dora_bert(use_dora=False)),
    "selection": lambda: add_selection(dora_bert(use_dora=False)),
}


def outputs(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the parameters that they depend on, by names without adapter."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=token_ids()).logits
    logits.square().sum().backward()
    named = model.named_parameters(remove_duplicate=False)
    return logits.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("name", MAKERS)
def test_a_copy_computes_what_the_adapter_does(name: str) -> None:
    """With the forward pass and the parametrisations of the adapter."""
    model = randomise(MAKERS[name]())
    expected, slopes = outputs(model)
    folds = AdapterFolds(model, 3)
    for k in range(3):
        with folds.active(k):
            logits, found = outputs(model)
        assert torch.equal(logits, expected)
        found = {n.replace(f".fold{k}", ".default"): slope for n, slope in found.items()}
        assert found.keys() == slopes.keys()
        assert all(torch.equal(found[n], slopes[n]) for n in slopes)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind_are_copied(kind: str) -> None:
    model, x = randomise(single(kind)), layer_input(kind)
    expected = model(x)
    folds = AdapterFolds(model, 2)
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if ".default" in n:
                parameter.zero_()
    with folds.active(1):
        assert torch.equal(model(x), expected)


def test_parameters_are_apart_but_for_those_that_are_shared() -> None:
    model = dora_bert()
    magnitudes = list(split_parameters(model).magnitudes.values())
    folds = AdapterFolds(model, 3, shared=magnitudes)
    owned = []
    for k in range(3):
        with folds.alone(k):
            split = split_parameters(model)
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert [*split.magnitudes.values()] == magnitudes
        assert trained == {*split.magnitudes, *split.directions, *split.rest}
        owned += [*split.directions.values(), *split.rest.values()]
    assert len(split.rest) == 2  # the head has a copy too
    assert len({p.data_ptr() for p in owned}) == len(owned) == 3 * 10
    assert all(p.requires_grad for p in (*owned, *magnitudes))
    folds.join()
    assert [*split_parameters(model).magnitudes.values()] == magnitudes


@pytest.mark.parametrize(
    ("make", "variables"),
    [("singular values", pseudo_singular_values), ("selection", component_weights)],
)
def test_a_parametrisation_shares_its_upper_variables(make: str, variables: Any) -> None:
    model = randomise(MAKERS[make]())
    found = [v if isinstance(v, Tensor) else v.logits for v in variables(model).values()]
    folds = AdapterFolds(model, 2, shared=found)
    with folds.active(1):
        again = [v if isinstance(v, Tensor) else v.logits for v in variables(model).values()]
    assert all(a is b for a, b in zip(found, again, strict=True))


def test_frozen_and_unfrozen_parameters_stay_as_they_were() -> None:
    """Also those of the base model; PEFT freezes these, and unfreezes an adapter it activates."""
    model = dora_bert()
    for n, parameter in model.named_parameters():
        if "lora_A" in n:
            parameter.requires_grad_(False)
        if "LayerNorm" in n:
            parameter.requires_grad_(True)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    folds = AdapterFolds(model, 2)

    def flags() -> dict[str, bool]:
        return {n: p.requires_grad for n, p in model.named_parameters()}

    whole = before | {
        n.replace(".default", ".fold1"): flag for n, flag in before.items() if ".default" in n
    }
    assert flags() == whole
    with folds.active(1):
        assert flags() == whole

    def stopped() -> None:
        with folds.alone(1):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert flags() == whole and model.active_adapters == ["default"]
    folds.delete()
    assert flags() == before


def test_the_joined_adapter_is_the_mean_and_plain(tmp_path: Path) -> None:
    model, plain = randomise(dora_bert()), dora_bert()
    folds = AdapterFolds(model, 3)
    states = []
    for k in range(3):
        with folds.active(k):
            randomise_active(model, k)
        states.append(get_peft_model_state_dict(model, adapter_name=folds.names[k]))
        states[-1] = {n: v.clone() for n, v in states[-1].items()}
    folds.join()
    for n, value in get_peft_model_state_dict(model).items():
        mean = torch.stack([state[n] for state in states]).mean(0)
        assert torch.allclose(value, mean, rtol=1e-14, atol=0), n
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set()
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(loaded(token_ids()).logits, model.eval()(token_ids()).logits)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == states[0].keys()


def randomise_active(model: PeftModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    (name,) = model.active_adapters
    with torch.no_grad():
        for n, p in model.named_parameters():
            if f".{name}." in n:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))


def test_an_initialisation_that_changes_the_base_happens_once() -> None:
    model = single(dtype=torch.float32, use_dora=False, init_lora_weights="pissa")
    before = {n: p.clone() for n, p in model.named_parameters()}
    folds = AdapterFolds(model, 2)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    with folds.active(1):
        again = model(layer_input("linear", torch.float32))
    assert torch.equal(again, model(layer_input("linear", torch.float32)))


class Squares(Problem):
    """The squared outputs on rows x of a fold."""

    def __init__(self, model: nn.Module, x: Tensor, owned: Any) -> None:
        self.model, self.x = model, x
        super().__init__(owned)

    def loss(self, batch: Any) -> Tensor:
        return (self.model(self.x) - 1).square().mean()


class Decayed(Squares):
    """With a ridge, so that the minimum is one."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + sum(p.square().sum() for p in self.variables)


@pytest.mark.parametrize("method", ["exact", "cg:product=difference", "darts"])
def test_levels_over_the_folds_are_a_cross_fitted_program(method: str) -> None:
    """The hypergradient is the mean of those of K models with an adapter each."""
    rows = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def made() -> PeftModel:
        return randomise(set_norm_grad(single()))

    def levels(model: PeftModel, k: int) -> tuple[Problem, Problem]:
        split = split_parameters(model)
        below = torch.cat([rows[i] for i in range(3) if i != k])
        return Squares(model, rows[k], split.magnitudes), Decayed(model, below, split.directions)

    separate = [hypergradient(*levels(made(), k), method) for k in range(3)]
    model = made()
    first = levels(model, 0)
    folds, pairs = AdapterFolds(model, 3, shared=first[0].variables), [first]
    for k in (1, 2):
        with folds.alone(k):
            pairs.append(levels(model, k))
    upper, lower = cross_fit(*zip(*pairs, strict=True), within=folds.active)
    found = hypergradient(upper, lower, method)
    for joint, parts in zip(found, zip(*separate, strict=True), strict=True):
        mean = torch.stack(parts).mean(0)
        assert (joint - mean).norm() < 1e-6 * mean.norm()


def test_what_peft_cannot_copy_is_refused() -> None:
    with pytest.raises(ProblemError, match="bias"):
        AdapterFolds(wrap(bert(), bias="lora_only", target_modules=["query"]), 2)
    model = dora_bert()
    AdapterFolds(model, 2)
    with pytest.raises(ProblemError, match="already exists"):
        AdapterFolds(model, 2)
    with pytest.raises(ProblemError, match="PeftModel"):
        AdapterFolds(Single(nn.Linear(1, 1)), 2)  # type: ignore[arg-type]
