"""The mathematics of examples/methods: closed forms, autograd, and adapters that PEFT loads."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from hyperopt_peft import Engine, hypergradient
from hyperopt_peft.adapters import lora_layers

FOLDER = Path(__file__).parents[2] / "examples/methods"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ranks, rates = example("rank_selection"), example("hyperparameters")


class Sum(nn.Module):
    """y = first(x) + second(z), with the mean square as its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor, z: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.first(x) + self.second(z) - y).square().mean())


def base(seed: int = 0) -> Sum:
    torch.manual_seed(seed)
    return Sum().double()


def adapted(seed: int = 0, rank: int = 4) -> Any:
    targets = ["first", "second"]
    return get_peft_model(base(seed), LoraConfig(r=rank, lora_alpha=4, target_modules=targets))


def examples(count: int, weights: Any) -> dict[str, Tensor]:
    """Outputs of ``weights``, with noise."""
    x, z = torch.randn(2, count, 8, dtype=torch.float64)
    y = x @ weights[0].T + z @ weights[1].T
    return {"x": x, "z": z, "y": y + torch.randn_like(y) / 2}


def moved(*levels: Any, size: float = 0.5) -> None:
    with torch.no_grad():
        for p in (p for level in levels for p in level.variables):
            p += size * torch.randn_like(p)


def selection(form: str, decay: float, seed: int = 0, count: int = 60) -> tuple[Any, Any, Any]:
    """Levels on data of W0 plus a rank-1 matrix of norm 2 in ``first``, nothing in ``second``."""
    model, start = ranks.add_selection(adapted(seed), form), base(seed)
    u, v = (nn.functional.normalize(torch.randn(n, dtype=torch.float64), dim=0) for n in (6, 8))
    true = (start.first.weight.detach() + 2 * torch.outer(u, v), start.second.weight.detach())
    lower = ranks.Components(model, decay=decay, data=[examples(count, true)])
    return model, ranks.Selection(model, data=[examples(count, true)]), lower


def tuned(learn: list[str]) -> tuple[Any, Any, Any]:
    model = rates.add_hyperparameters(adapted(rank=2), decay=0.2)
    data = [examples(8, torch.randn(2, 6, 8, dtype=torch.float64)) for _ in range(2)]
    upper = rates.Hyperparameters(model, learn, 0.03, data=[data[0]])
    lower = rates.Regularised(model, upper, data=[data[1]])
    moved(lower)
    for part in rates.layer_hyperparameters(model).values():
        nn.init.normal_(part.log_scale)
    return model, upper, lower


def flat(gradients: Any, like: Any) -> Tensor:
    pairs = zip(gradients, like, strict=True)
    return torch.cat(
        [torch.zeros_like(x).flatten() if g is None else g.flatten() for g, x in pairs]
    )


@pytest.mark.parametrize("method", ["softmax", "sigmoid", "hyperparameters"])
def test_hypergradients_are_those_of_autograd(method: str) -> None:
    """∂F/∂u − ∂²f/∂u∂w H⁻¹ ∂F/∂w, written out; the decay keeps H away from singular."""
    if method == "hyperparameters":
        _, upper, lower = tuned(["decay", "scale"])
    else:
        _, upper, lower = selection(method, 0.5)
        moved(upper, lower)
    w, u = lower.variables, upper.variables
    f, big_f = lower.evaluate(lower.peek_batch())[0], upper.evaluate(upper.peek_batch())[0]
    slope = flat(grad(f, w, create_graph=True), w)
    hessian = torch.stack([flat(grad(s, w, retain_graph=True), w) for s in slope])
    of_upper = grad(big_f, (*w, *u), allow_unused=True)
    v = torch.linalg.solve(hessian, flat(of_upper[: len(w)], w))
    mixed = flat(grad(slope @ v, u), u)
    assert (mixed != 0).all()
    expected = flat(of_upper[len(w) :], u) - mixed
    actual = flat(hypergradient(upper, lower, "exact"), u)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_the_learning_rate_is_differentiated_through_the_steps() -> None:
    """Three steps of gradient descent with momentum at the learnt rate, as one graph."""
    model, upper, lower = tuned(["decay", "scale", "rate"])
    lower.optimizer = torch.optim.SGD(lower.variables, lr=9.0, momentum=0.5)
    upper.optimizer = torch.optim.SGD(upper.variables, lr=1.0)
    w, u = dict(zip(lower.names, lower.variables, strict=True)), upper.variables
    before, velocity = flat(u, u).detach(), None
    for _ in range(3):
        loss = functional_call(model, w, (), lower.peek_batch()).loss
        for name, p in w.items():
            layer = rates.layer_hyperparameters(model)[name.partition(".lora_")[0]]
            loss = loss + layer.log_decay.exp().sum() / 2 * p.square().sum()
        g = grad(loss, list(w.values()), create_graph=True)
        velocity = g if velocity is None else [v / 2 + d for v, d in zip(velocity, g, strict=True)]
        pairs = zip(w.items(), velocity, strict=True)
        w = {n: p - upper.log_rate.exp() * v for (n, p), v in pairs}
    expected = flat(grad(functional_call(model, w, (), upper.peek_batch()).loss, u), u)
    Engine(upper, lower, "unrolled:steps=3", lower_steps=3, progress=False).run(1)
    torch.testing.assert_close(before - flat(u, u).detach(), expected, rtol=1e-11, atol=1e-13)


def test_scales_and_decays_are_those_of_the_formulas(tmp_path: Path) -> None:
    model, upper, lower = tuned(["decay"])
    batch, squares, updates = lower.peek_batch(), 0.0, []
    for name, layer in lora_layers(model):
        a, b = layer.lora_A.default.weight, layer.lora_B.default.parametrizations.weight
        squares += upper.values()[f"{name}.decay"] * (a.square().sum() + b.original.square().sum())
        updates.append(b[0].log_scale.exp() * 4 / 2 * b.original @ a)
    loss, metrics = lower.evaluate(batch)
    torch.testing.assert_close(loss.detach(), metrics["task_loss"] + squares.detach() / 2)
    by_hand = base()
    by_hand.first.weight.data += updates[0].detach()
    by_hand.second.weight.data += updates[1].detach()
    assert metrics["task_loss"] == pytest.approx(by_hand(**batch).loss.item(), rel=1e-12)
    rates.fold_scales(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(again(**batch).loss.item(), metrics["task_loss"])


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_components_are_multiplied_by_their_weights(form: str) -> None:
    model, plain = adapted(), adapted()
    for one in (model, plain):
        torch.manual_seed(1)
        for p in one.parameters():
            torch.nn.init.normal_(p) if p.requires_grad else p
    batch = examples(5, torch.randn(2, 6, 8, dtype=torch.float64))
    expected = plain(**batch).loss
    assert torch.equal(ranks.add_selection(model, form)(**batch).loss, expected)
    for name, part in ranks.component_weights(model).items():
        nn.init.normal_(part.logits)
        beta = part.logits.detach().flatten()
        alpha = 4 * beta.softmax(0) if form == "softmax" else 2 * beta.sigmoid()
        plain.get_submodule(f"base_model.model.{name}").lora_B.default.weight.data *= alpha
    torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)


def test_ranks_are_counts_and_make_a_stock_adapter(tmp_path: Path) -> None:
    model = ranks.add_selection(adapted())
    alphas = zip(ranks.component_weights(model).values(), ([3, 3, 1, 1], [1, 5, 1, 1]), strict=True)
    for part, alpha in alphas:  # weights (1.5, 1.5, .5, .5) and (.5, 2.5, .5, .5)
        part.logits.data = torch.tensor(alpha, dtype=torch.float64).log()[:, None]
    assert ranks.selected_ranks(model) == {"first": 2, "second": 1}
    assert ranks.selected_ranks(model, 2.0) == {"first": 0, "second": 1}
    for wanted in ({"first": 2, "second": 1}, {"first": 0, "second": 3}):
        get_peft_model(base(), ranks.rank_config(model, wanted)).save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base(), tmp_path)
        layers = {name.rpartition(".")[2]: layer for name, layer in lora_layers(again)}
        assert {n: x.r["default"] for n, x in layers.items()} == {
            n: r for n, r in wanted.items() if r
        }
        assert all(layer.scaling["default"] == pytest.approx(1) for layer in layers.values())
