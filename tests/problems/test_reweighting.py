"""Weights of examples: their hypergradient, what they switch off, and both drivers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import default_data_collator

from hyperopt_peft import (
    BilevelTrainer,
    BilevelTrainingArguments,
    Engine,
    ProblemError,
    hypergradient,
)
from hyperopt_peft.problems.example_weights import HeldOut
from hyperopt_peft.problems.reweighting import SampleWeights, Weighted, WeightNet
from tests.support.trainers import data, peft_model
from tests.support.weighted_levels import Linear, central_difference, regularised, rows, value


def linear_levels(weights: Any, count: int = 30) -> tuple[Any, ...]:
    """Both levels over the linear classifier, their batches, and which labels were redrawn."""
    model = Linear()
    noisy, redrawn = rows(count, seed=1, noise=0.4)
    clean, _ = rows(50, seed=2)
    noisy["index"] = torch.arange(count)
    levels = HeldOut(model, weights), regularised(Weighted(model, weights))
    return *levels, clean, noisy, redrawn


def sample_weights(count: int) -> Any:
    weights = SampleWeights(count).double()
    torch.nn.init.normal_(weights.logits)
    return weights


def weight_net() -> Any:
    weights = WeightNet(5).double()
    for parameter in weights.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return weights


@pytest.mark.parametrize("make", [lambda: sample_weights(30), weight_net])
def test_the_hypergradient_is_the_slope_of_the_value(make: Any) -> None:
    weights = make()
    upper, lower, clean, noisy, _ = linear_levels(weights)
    value(upper, lower, clean, noisy)
    slopes = hypergradient(upper, lower, "exact", upper_batch=clean, lower_batch=noisy)
    for variable, slope in zip(upper.variables, slopes, strict=True):
        flat, slope = variable.view(-1), slope.view(-1)
        for entry in slope.abs().topk(min(3, len(slope))).indices.tolist():
            expected = central_difference(flat, entry, lambda: value(upper, lower, clean, noisy))
            assert float(slope[entry]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def adapter_levels(weights: Any, rows: int = 6, kind: str = "classes") -> tuple[Any, ...]:
    """Both levels over a BERT with LoRA in float64, and a batch for each."""
    model = peft_model(kind, dropout=0.0, dora=False).double()
    noisy = default_data_collator([dict(row) for row in data(kind, rows, seed=1)])
    clean = default_data_collator([dict(row) for row in data(kind, 5, seed=2)])
    noisy["index"] = torch.arange(rows)
    return model, HeldOut(model, weights), Weighted(model, weights), clean, noisy


def flat_gradient(loss: Any, variables: Any) -> Any:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, variables)])


def test_an_example_gains_as_far_as_its_gradient_points_to_the_clean_one() -> None:
    """One step: dF/du_i = −ξ σ'(u_i)/n · ∇ℓ_i·∇F, each ∇ℓ_i by the model's own loss."""
    weights = sample_weights(6)
    model, upper, lower, clean, noisy = adapter_levels(weights)
    goal = flat_gradient(model(**clean).loss, lower.variables)
    expected = []
    for i, u in enumerate(weights.logits.detach()):
        row = {k: v[i : i + 1] for k, v in noisy.items() if k != "index"}
        aligned = flat_gradient(model(**row).loss, lower.variables) @ goal
        expected.append(-0.7 / 6 * u.sigmoid() * (1 - u.sigmoid()) * aligned)
    for product, accuracy in (("exact", 1e-12), ("difference", 1e-6)):
        method = f"darts:xi=0.7,product={product}"
        (slope,) = hypergradient(upper, lower, method, upper_batch=clean, lower_batch=noisy)
        torch.testing.assert_close(slope, torch.stack(expected), rtol=accuracy, atol=accuracy)


def test_meta_weight_net_with_detached_losses_is_the_published_step() -> None:
    """dF/du = −ξ/n Σ_i ∇ℓ_i·∇F · ∂V(ℓ_i)/∂u, which differences do not see."""
    weights = weight_net()
    weights.detach = True
    model, upper, lower, clean, noisy = adapter_levels(weights)
    goal = flat_gradient(model(**clean).loss, lower.variables)
    total = 0
    for i in range(6):
        loss = model(**{k: v[i : i + 1] for k, v in noisy.items() if k != "index"}).loss
        weight = weights(loss.detach()[None], None).sum()
        aligned = flat_gradient(loss, lower.variables) @ goal
        total = total - 0.7 / 6 * aligned * flat_gradient(weight, upper.variables)

    def slope_by(product: Any) -> Any:
        method = f"darts:xi=0.7,product={product}"
        parts = hypergradient(upper, lower, method, upper_batch=clean, lower_batch=noisy)
        return torch.cat([part.flatten() for part in parts])

    torch.testing.assert_close(slope_by("exact"), total, rtol=1e-10, atol=1e-13)
    assert (slope_by("difference") - total).norm() > 0.1 * total.norm()
    weights.detach = False
    torch.testing.assert_close(slope_by("difference"), slope_by("exact"), rtol=1e-5, atol=1e-9)


def test_a_weight_of_zero_takes_the_example_out_of_training() -> None:
    weights = sample_weights(6)
    with torch.no_grad():
        weights.logits[2] = -torch.inf
    _, upper, lower, clean, noisy = adapter_levels(weights)
    with_it = lower.gradient(noisy, lower.variables).gradient
    noisy["labels"][2] = (noisy["labels"][2] + 1) % 3
    noisy["input_ids"][2] = 7
    for before, after in zip(with_it, lower.gradient(noisy, lower.variables).gradient):
        assert torch.equal(before, after)
    rest = torch.tensor([0, 1, 3, 4, 5])
    without = lower.gradient({k: v[rest] for k, v in noisy.items()}, lower.variables).gradient
    for of_all, of_rest in zip(with_it, without, strict=True):
        torch.testing.assert_close(6 * of_all, 5 * of_rest)
    (slope,) = hypergradient(upper, lower, "darts", upper_batch=clean, lower_batch=noisy)
    assert slope[2] == 0 and slope[rest].abs().min() > 0


def test_examples_outside_the_batch_keep_their_weight() -> None:
    weights = sample_weights(9)
    _, upper, lower, clean, noisy = adapter_levels(weights)
    noisy["index"] = torch.tensor([8, 0, 4, 2, 6, 1])
    (slope,) = hypergradient(upper, lower, "darts", upper_batch=clean, lower_batch=noisy)
    assert set(slope.nonzero().flatten().tolist()) == {0, 1, 2, 4, 6, 8}


def test_weights_and_unweighted_loss_are_logged() -> None:
    weights = sample_weights(6)
    model, _, lower, _, noisy = adapter_levels(weights)
    loss, metrics = lower.evaluate(noisy)
    each = cross_entropy(
        model(input_ids=noisy["input_ids"], attention_mask=noisy["attention_mask"]).logits,
        noisy["labels"],
        reduction="none",
    )
    v = weights.logits.sigmoid()
    assert loss.item() == pytest.approx((v * each).mean().item())
    assert metrics == pytest.approx({"weight": v.mean().item(), "task_loss": each.mean().item()})


@pytest.mark.parametrize(
    "make", [lambda: SampleWeights(60).double(), lambda: WeightNet(8).double()]
)
def test_the_engine_finds_wrong_labels(make: Callable[..., Any]) -> None:
    weights = make()
    model = Linear()
    noisy, redrawn = rows(60, seed=1, noise=0.4)
    clean, _ = rows(100, seed=2)
    noisy["index"] = torch.arange(60)
    truth, _ = rows(60, seed=1)
    wrong = noisy["labels"] != truth["labels"]
    upper = HeldOut(
        model, weights, data=[clean], optimizer=torch.optim.Adam(weights.parameters(), lr=0.1)
    )
    lower = regularised(
        Weighted(model, weights, data=[noisy], optimizer=torch.optim.SGD([model.w], lr=1.0))
    )
    Engine(upper, lower, "minres", lower_steps=10, progress=False).run(30)
    with torch.no_grad():
        each = cross_entropy(model(noisy["x"]).logits, noisy["labels"], reduction="none")
        learned = weights(each, noisy)
    assert redrawn.sum() >= wrong.sum() > 10
    assert learned[~wrong].mean() > learned[wrong].mean() + 0.1


def arguments(folder: Path, **options: Any) -> BilevelTrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "upper_learning_rate": 1e-1,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return BilevelTrainingArguments(**{**settings, **options})


def trainer(folder: Path, weights: Any, train: Any, **options: Any) -> BilevelTrainer:
    model = peft_model(dora=False)
    return BilevelTrainer(
        model,
        lower=Weighted(model, weights),
        upper=HeldOut(model, weights),
        args=arguments(folder, **options),
        train_dataset=train,
        upper_dataset=data(rows=10, seed=1),
    )


def test_the_trainer_moves_the_weights_of_the_examples_it_has_seen(tmp_path: Path) -> None:
    weights = SampleWeights(24)
    train = data().add_column("index", range(24))
    run = trainer(tmp_path, weights, train, max_steps=3)
    seen = set()
    loss = run.lower.loss
    run.lower.loss = lambda batch: seen.update(batch["index"].tolist()) or loss(batch)
    run.train()
    assert len(seen) == 12
    assert set(weights.logits.nonzero().flatten().tolist()) == seen
    records = [record for record in run.state.log_history if "upper_loss" in record]
    assert len(records) == 3 and records[0]["lower_weight"] == 0.5
    assert run.evaluate(data(rows=6, seed=3))["eval_loss"] > 0


def test_the_trainer_moves_the_net(tmp_path: Path) -> None:
    weights = WeightNet(4)
    before = [p.detach().clone() for p in weights.parameters()]
    trainer(tmp_path, weights, data()).train()
    assert not any(map(torch.equal, before, weights.parameters()))


def test_an_index_is_asked_for_before_anything_moves(tmp_path: Path) -> None:
    weights = SampleWeights(24)
    with pytest.raises(ProblemError, match=r"'index'.*remove_unused_columns"):
        trainer(tmp_path, weights, data()).train()
    train = data().add_column("index", range(24))
    with pytest.raises(ProblemError, match="'index'"):
        trainer(tmp_path, weights, train, remove_unused_columns=True).train()
    with pytest.raises(ProblemError, match=r"training example.* 5"):
        trainer(tmp_path, SampleWeights(5), train).train()
    assert not weights.logits.any()
