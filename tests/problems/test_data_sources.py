"""Mixture weights: their hypergradient, who gains and who loses, and both drivers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from transformers import default_data_collator

from hyperopt_peft import (
    BilevelTrainer,
    BilevelTrainingArguments,
    Engine,
    ProblemError,
    hypergradient,
)
from hyperopt_peft.core.labels import label_losses
from hyperopt_peft.problems.data_sources import Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import HeldOut, example_losses
from tests.support.trainers import data, peft_model
from tests.support.weighted_levels import Linear, central_difference, regularised, rows, value

NAMES = ["right", "wrong", "half"]


def pooled(per_source: int = 20) -> Any:
    """Rows of three sources: the target's labels, ones moved by a class, half of them so."""
    batch, _ = rows(3 * per_source, seed=1)
    batch["source"] = torch.arange(3 * per_source) % 3
    wrong = (batch["source"] == 1) | (
        (batch["source"] == 2) & (torch.arange(len(batch["x"])) % 2 == 0)
    )
    batch["labels"] = torch.where(wrong, (batch["labels"] + 1) % 3, batch["labels"])
    return batch


def linear_levels(logits: Any = (0.0, 0.0, 0.0)) -> tuple[Any, ...]:
    model, weights = Linear(), SourceWeights(dict.fromkeys(NAMES, 20), kind="softmax").double()
    with torch.no_grad():
        weights.logits.copy_(torch.tensor(logits))
    upper, lower = HeldOut(model, weights), regularised(Mixture(model, weights))
    return upper, lower, rows(50, seed=2)[0], pooled()


def test_the_hypergradient_is_the_slope_of_the_value() -> None:
    upper, lower, target, mixture = linear_levels((0.3, -0.5, 0.2))
    value(upper, lower, target, mixture)
    (slope,) = hypergradient(upper, lower, "exact", upper_batch=target, lower_batch=mixture)
    (logits,) = upper.variables
    for entry in range(3):
        expected = central_difference(logits, entry, lambda: value(upper, lower, target, mixture))
        assert float(slope[entry]) == pytest.approx(expected, rel=1e-6)
    assert float(slope.sum()) == pytest.approx(0, abs=1e-12)  # softmax knows differences alone


def test_the_right_source_gains_and_the_wrong_one_loses() -> None:
    upper, lower, target, mixture = linear_levels()
    value(upper, lower, target, mixture)
    (slope,) = hypergradient(upper, lower, "exact", upper_batch=target, lower_batch=mixture)
    assert slope[0] < 0 < slope[1]


def adapter_levels(sources: int = 3, size: int = 6, kind: str = "causal") -> tuple[Any, ...]:
    """Both levels over a two-layer Llama with LoRA in float64, and a batch for each."""
    model = peft_model(kind, dropout=0.0, dora=False).double()
    mixture = default_data_collator([dict(row) for row in data(kind, size, seed=1)])
    target = default_data_collator([dict(row) for row in data(kind, 4, seed=2)])
    mixture["source"] = torch.arange(size) % sources
    counts = {str(s): size // sources for s in range(sources)}
    weights = SourceWeights(counts, kind="softmax", average="sources").double()
    torch.nn.init.normal_(weights.logits)
    return model, HeldOut(model, weights), Mixture(model, weights), target, mixture


def flat_gradient(loss: Any, variables: Any) -> Any:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, variables)])


def test_a_source_gains_as_far_as_its_gradient_points_to_the_targets() -> None:
    """One step on a causal model: dF/du = −ξ (diag p − p pᵀ) (∇L_s·∇F)_s."""
    model, upper, lower, target, mixture = adapter_levels()
    goal = flat_gradient(upper.loss(target), lower.variables)
    aligned = torch.stack(
        [
            flat_gradient(
                example_losses(model, {k: v[s::3] for k, v in mixture.items()}).mean(),
                lower.variables,
            )
            @ goal
            for s in range(3)
        ]
    )
    p = upper.variables[0].softmax(0).detach()
    expected = -0.7 * p * (aligned - p @ aligned)
    # Llama takes its norms, and Transformers a language model's loss, in float32 at best.
    for product, accuracy in (("exact", 1e-5), ("difference,epsilon=0.003", 1e-2)):
        method = f"darts:xi=0.7,product={product}"
        (slope,) = hypergradient(upper, lower, method, upper_batch=target, lower_batch=mixture)
        torch.testing.assert_close(slope, expected, rtol=accuracy, atol=1e-9)


def test_a_source_that_is_the_target_gains_against_one_with_the_opposite_gradient() -> None:
    """Two sources, the target itself and −F: p₀p₁·2‖∇F‖² is what the first one gains."""
    model, upper, lower, target, _ = adapter_levels(2)
    mixture = {k: torch.cat([v, v]) for k, v in target.items()}
    mixture["source"] = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])

    class Opposed(Mixture):
        def loss(self, batch: Any) -> Any:
            losses = example_losses(model, batch)
            p = self.weights.shares()
            return p[0] * losses[:4].mean() - p[1] * losses[4:].mean()

    opposed = Opposed(model, lower.weights)
    goal = flat_gradient(upper.loss(target), lower.variables)
    p = upper.variables[0].softmax(0).detach()
    gain = 2 * p[0] * p[1] * goal @ goal
    method = "darts:product=exact"
    (slope,) = hypergradient(upper, opposed, method, upper_batch=target, lower_batch=mixture)
    torch.testing.assert_close(slope, torch.stack([-gain, gain]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("average", ["rows", "sources"])
def test_the_loss_is_the_weighted_sum_of_the_sources_means(average: Any) -> None:
    """On all examples; with weights by row each mean counts by its number of examples too."""
    model, _, lower, _, mixture = adapter_levels()
    mixture["source"] = torch.tensor([2, 0, 2, 2, 0, 1])
    counts = mixture["source"].bincount()
    weights = SourceWeights({str(s): int(n) for s, n in enumerate(counts)}, average=average)
    weights = weights.double()
    torch.nn.init.normal_(weights.logits)
    lower.weights = weights
    loss, metrics = lower.evaluate(mixture)
    each, a = example_losses(model, mixture), weights.logits.sigmoid()
    means = torch.stack([each[mixture["source"] == s].mean() for s in range(3)])
    mass = a * counts if average == "rows" else a
    torch.testing.assert_close(loss, mass @ means / mass.sum())
    assert sum(metrics[f"share_{s}"] for s in range(3)) == pytest.approx(1)


def test_labels_have_sources_too() -> None:
    """Of a row of several documents: Σ_t v_k(t) ℓ_t / N, whose slope by u is that of the sum."""
    model, _, lower, _, mixture = adapter_levels()
    weights = lower.weights
    del mixture["source"]
    mixture["labels"][1, :3] = mixture["labels"][2, 3:] = -100
    source = (torch.arange(36) // 5 % 3).view(6, 6)
    losses, scored = label_losses(model, mixture)
    expected = (weights()[source] * losses).sum() / scored.sum()
    variables = (*lower.variables, weights.logits)
    value = lower.gradient({**mixture, "source": source}, variables)
    assert value.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    for one, other in zip(value.gradient, torch.autograd.grad(expected, variables), strict=True):
        torch.testing.assert_close(one, other)
    torch.nn.init.zeros_(weights.logits)
    weights.average = "rows"
    loss = lower.loss({**mixture, "source": source})
    torch.testing.assert_close(loss["loss"].float(), model(**mixture).loss)
    assert loss["loss"] == loss["task_loss"]


def test_a_source_a_row_is_none_for_rows_in_one() -> None:
    """A padding-free batch has one loss, over which the sources must not be broadcast."""
    _, _, lower, _, mixture = adapter_levels()
    flat = {name: values.view(1, -1) for name, values in mixture.items() if name != "source"}
    with pytest.raises(ProblemError, match=r"source.*\(6,\).*\(1, 36\)"):
        lower.loss({**flat, "source": mixture["source"]})


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(-5, 5)), min_size=2, max_size=6))
def test_the_mean_weight_is_one(sources: Any) -> None:
    """So that the weights cannot act as a learning rate."""
    for kind in ("sigmoid", "softmax"):
        for average in ("rows", "sources"):
            counts = {str(k): count for k, (count, _) in enumerate(sources)}
            weights = SourceWeights(counts, kind=kind, average=average).double()  # type: ignore[arg-type]
            with torch.no_grad():
                weights.logits.copy_(torch.tensor([logit for _, logit in sources]))
            assert float((weights() * weights.counts).sum()) == pytest.approx(
                float(weights.counts.sum())
            )


def test_a_weight_of_zero_takes_the_source_out_of_training() -> None:
    _, upper, lower, target, mixture = adapter_levels()
    with torch.no_grad():
        upper.variables[0][1] = -torch.inf
    before = lower.gradient(mixture, lower.variables).gradient
    mixture["input_ids"][1::3] = 7
    mixture["labels"][1::3] = 9
    for one, other in zip(before, lower.gradient(mixture, lower.variables).gradient, strict=True):
        assert torch.equal(one, other)
    (slope,) = hypergradient(upper, lower, "darts", upper_batch=target, lower_batch=mixture)
    assert slope[1] == 0 and slope[0] != 0


def test_the_engine_moves_the_weight_to_the_right_source() -> None:
    model, weights = Linear(), SourceWeights(dict.fromkeys(NAMES, 20), kind="softmax").double()
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.1)
    upper = HeldOut(model, weights, data=[rows(50, seed=2)[0]], optimizer=optimizer)
    lower = regularised(
        Mixture(model, weights, data=[pooled()], optimizer=torch.optim.SGD([model.w], lr=0.5))
    )
    history = Engine(upper, lower, "cg", lower_steps=10, progress=False).run(30)
    assert weights.shares()[0] > 0.9
    assert history[-1]["upper_loss"] < history[0]["upper_loss"]


def trainer(folder: Path, weights: Any, train: Any, **options: Any) -> BilevelTrainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 48,
        "learning_rate": 3e-2,
        "upper_learning_rate": 0.1,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    model = peft_model("causal", dropout=0.0, dora=False, modules_to_save=["lm_head"])
    return BilevelTrainer(
        model,
        lower=Mixture(model, weights),
        upper=HeldOut(model, weights),
        args=BilevelTrainingArguments(**{**settings, **options}),
        train_dataset=train,
        upper_dataset=texts(48, words=6, seed=5),
    )


def texts(count: int, *, words: str, seed: int) -> Any:
    """Random tokens, ``words`` different ones."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 3 + words, (count, 6), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def test_the_trainer_moves_the_weight_to_the_targets_source(tmp_path: Path) -> None:
    sources = [texts(24, words=6, seed=1), texts(24, words=47, seed=2)]
    train = concatenate_datasets(
        [part.add_column("source", [s] * 24) for s, part in enumerate(sources)]
    )
    weights = SourceWeights({"target": 24, "noise": 24}, kind="softmax")
    run = trainer(tmp_path, weights, train)
    run.train()
    records = [record for record in run.state.log_history if "upper_loss" in record]
    shares = [record["lower_share_target"] for record in records]
    assert shares[0] == 0.5 and shares[-1] > 0.6
    assert records[-1]["upper_loss"] < records[0]["upper_loss"]


def test_a_source_is_asked_for_before_anything_moves(tmp_path: Path) -> None:
    weights = SourceWeights({"a": 12, "b": 12})
    train = data("causal")
    with pytest.raises(ProblemError, match="'source'"):
        trainer(tmp_path, weights, train).train()
    train = train.add_column("source", [row % 3 for row in range(24)])
    with pytest.raises(ProblemError, match="'source'"):
        trainer(tmp_path, weights, train, remove_unused_columns=True).train()
    with pytest.raises(ProblemError, match=r" 2.*source"):
        trainer(tmp_path, weights, train).train()
    assert not weights.logits.any()


@pytest.mark.parametrize("counts", [{"one": 3}, {}, ["a", "b"], {"a": 3, "b": 0}])
def test_sources_have_names_and_examples(counts: Any) -> None:
    with pytest.raises(ProblemError, match="source"):
        SourceWeights(counts)
