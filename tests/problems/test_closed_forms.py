"""Formulas that the derivatives and minima of the methods meet."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from hyperopt_peft import hypergradient
from hyperopt_peft.adapters.gains import gained_layers
from hyperopt_peft.core.labels import row_losses
from hyperopt_peft.engine import lbfgs
from hyperopt_peft.problems import SEAL, AutoLoRA, BiLoRA, LayerDecay, LayerScales, Sources
from tests.support.adapted_models import adapted_layer, layer_input, randomise, single, two_layers
from tests.support.solved_levels import SGD
from tests.support.weighted_levels import Linear, rows


def prepared(method: Any, **options: Any) -> Any:
    """The prepared model with random factors, and u moved from its start."""
    model = two_layers(**options)
    method.prepare(model)
    with torch.no_grad():
        for u in method.upper_variables(model).values():
            u += 0.3 * torch.randn_like(u)
    return model


def slopes(model: Any, variables: Any) -> Any:
    """∂F/∂x of a function of the outputs."""
    x = torch.randn(7, 6, dtype=torch.float64)
    return torch.autograd.grad(model(x).sin().sum(), list(variables))


def test_a_layer_s_scale_moves_as_b_along_itself() -> None:
    """∂F/∂u_l = ⟨∂F/∂B_l, B_l⟩."""
    method = LayerScales()
    model = prepared(method)
    b = [
        each.layer.lora_B["default"].parametrizations.weight.original
        for each in gained_layers(model)
    ]
    found = slopes(model, [*method.upper_variables(model).values(), *b])
    expected = torch.stack([(g * w).sum() for g, w in zip(found[2:], b, strict=True)])
    torch.testing.assert_close(torch.cat(found[:2]).flatten(), expected)


@pytest.mark.parametrize("rank", [1, 4])
def test_autolora_s_slopes_have_no_sum_in_a_layer(rank: int) -> None:
    """softmax has none; of one term it is constant, and the term is kept."""
    method = AutoLoRA()
    model = prepared(method, r=rank)
    for slope in slopes(model, method.upper_variables(model).values()):
        assert abs(float(slope.sum())) < 1e-12 and (slope.norm() > 1e-4) == (rank > 1)
    method.finish(model)
    assert min(method.ranks.values()) >= 1 and (rank > 1 or max(method.ranks.values()) == 1)


def test_bilora_s_best_values_are_the_diagonal_of_the_least_squares_update() -> None:
    """Λ_i = P_iᵀ M Q_iᵀ of orthonormal P and Q, and M of whitened inputs."""
    model, method = randomise(single(use_dora=False, lora_alpha=2)), BiLoRA()
    x = torch.linalg.qr(torch.randn(30, 4, dtype=torch.float64)).Q
    y = torch.randn(30, 5, dtype=torch.float64)
    task = lambda _: mse_loss(model(x), y)  # noqa: E731
    upper, _ = method.levels(model, task, data=([0], [0]), optimizers=[SGD, SGD])
    base: Any = adapted_layer(model).get_base_layer()
    update = (y - x @ base.weight.T - base.bias).T @ x
    (each,) = gained_layers(model)
    lbfgs(upper, 0, tolerance=1e-10)
    expected = ((each.b.T @ update) * each.a).sum(1).detach()
    torch.testing.assert_close(upper.variables[0].detach().flatten(), expected, rtol=1e-6, atol=0)


def test_a_decay_s_hypergradient_is_that_of_ridge_regression() -> None:
    """B(u) = argmin ½‖Z Bᵀ − R‖²·k + ½e^u‖B‖² for a fixed A."""
    model, method = randomise(single(use_dora=False)), LayerDecay(start=-3.0)
    layer, x = adapted_layer(model), layer_input("linear").flatten(0, 1)
    a = layer.lora_A["default"].weight.requires_grad_(False)
    targets = torch.randn(2, len(x), 5, dtype=x.dtype)
    task = lambda row: mse_loss(model(x), targets[row])  # noqa: E731
    levels = method.levels(model, task, data=([0], [1]), optimizers=[SGD, SGD])
    lbfgs(levels[1], 1, tolerance=1e-12)
    (found,) = hypergradient(*levels, "exact")
    z, u = layer.scaling["default"] * x @ a.T, method.log_decays.detach().requires_grad_()
    rest, k = targets - layer.get_base_layer()(x).detach(), 2 / targets[0].numel()
    system = k * z.T @ z + u.exp() * torch.eye(2, dtype=x.dtype)
    b = torch.linalg.solve(system, k * z.T @ rest[1])
    torch.testing.assert_close(layer.lora_B["default"].weight.T, b, rtol=1e-6, atol=1e-9)
    (expected,) = torch.autograd.grad(mse_loss(z @ b, rest[0]), u)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_decays_are_those_of_layers(shared: bool) -> None:
    method = LayerDecay(start=-1.0, shared=shared)
    model = prepared(method)
    squares = [
        sum(w.square().sum() for n, w in model.named_parameters() if f"{name}.lora_" in n)
        for name in ("first", "second")
    ]
    found = method.penalty(model).detach()
    method.finish(model)
    assert list(method.decays) == ["first", "second"]
    assert (method.decays["first"] == method.decays["second"]) == shared
    by_hand = sum(e * float(q) for e, q in zip(method.decays.values(), squares, strict=True)) / 2
    assert float(found) == pytest.approx(by_hand)


def numbered(count: int, start: int = 0, **columns: Any) -> Dataset:
    return Dataset.from_dict({"index": list(range(start, start + count)), **columns})


@pytest.mark.parametrize("form", ["softmax", "softplus"])
def test_a_source_s_slope_is_its_agreement_less_the_mean(form: Any) -> None:
    """p'_j (g_j − Σ_k p_k g_k), g_k = −⟨∂F/∂w, ∂L_k/∂w⟩, and p'_j = p_j for softmax.

    DreamPRM: v = softplus(u)/mean softplus(u), f = Σ_k v_k S_k/N and S_k the sum of source k.
    """
    model, method = Linear(), Sources(prior=0.0, form=form)
    method.row_losses = row_losses
    method.rows(numbered(25, source=["a"] * 20 + ["b"] * 5), numbered(5))
    method.counts = counts = torch.tensor([20, 5, 5])
    method.prepare(model)
    u = method.logits.data = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64)
    below, above = rows(30, seed=1)[0], rows(20, seed=2)[0]
    below["source"] = torch.arange(3).repeat_interleave(counts)
    upper, lower = method.upper(model, lambda b: model(**b).loss), method.lower(model, None)
    batches = {"upper_batch": above, "lower_batch": below}
    (found,) = hypergradient(upper, lower, "darts:product=exact,xi=1.0", **batches)
    (b,) = torch.autograd.grad(model(**above).loss, model.w)
    losses = cross_entropy(model(below["x"]).logits, below["labels"], reduction="none")
    of_sources = [losses[below["source"] == k].mean() for k in range(3)]
    gradients = [torch.autograd.grad(x, model.w, retain_graph=True)[0] for x in of_sources]
    g = -torch.stack([(b * x).sum() for x in gradients])
    if form == "softmax":
        p = moved = u.softmax(0)
    else:
        positive = nn.functional.softplus(u)
        p, moved, g = positive / positive.sum(), u.sigmoid() / positive.mean(), g * counts / 30
    torch.testing.assert_close(found, moved * (g - p @ g))


def test_dreamprm_s_rows_start_alike() -> None:
    """And the shares of the loss are those of the sources' sizes."""
    method = Sources.published("dreamprm")
    method.rows(numbered(1010, source=["a"] * 1000 + ["b"] * 10), numbered(10))
    method.counts = torch.tensor([1000, 10, 10])
    method.prepare(Linear())
    assert method.weights({"source": torch.arange(3)}).tolist() == pytest.approx([1.0] * 3)
    assert method.p().tolist() == pytest.approx([1000 / 1020, 10 / 1020, 10 / 1020])


def test_seal_s_levels_are_its_two_steps() -> None:
    """∂/∂ω_j = σ_j/n·(ℓ_j − Σ_i σ_i ℓ_i/n) at fixed w, which is that of w's own loss by 1 − c."""
    model, method = Linear(), SEAL(trust=0.7)
    method.row_losses = row_losses
    method.rows(numbered(20), numbered(5, 20))
    method.prepare(model)
    method.logits.data = torch.linspace(-1, 1, 20, dtype=torch.float64)
    torch.nn.init.normal_(model.w)
    every = {**rows(25, seed=1)[0], "index": torch.arange(25)}
    train = {name: values[:20] for name, values in every.items()}
    upper, lower = method.upper(model, None), method.lower(model, None)
    batches = {"upper_batch": train, "lower_batch": every}
    losses = cross_entropy(model(every["x"]).logits, every["labels"], reduction="none").detach()
    sigma, of_train = method.row_weights().detach(), losses[:20]
    expected = sigma / 20 * (of_train - sigma @ of_train / 20)
    (found,) = hypergradient(upper, lower, "direct", **batches)
    torch.testing.assert_close(found, expected)
    loss = lower.loss(every)["loss"]
    by_hand = 0.7 * losses[20:].mean() + 0.3 * (sigma * of_train).mean()
    torch.testing.assert_close(loss.detach(), by_hand)
    torch.testing.assert_close(torch.autograd.grad(loss, method.logits)[0], 0.3 * expected)
