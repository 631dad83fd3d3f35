"""A cross-fitted Trainer: which rows train which adapter, and what is left at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from hyperopt_peft import (
    BilevelTrainer,
    BilevelTrainingArguments,
    Problem,
    ProblemError,
)
from hyperopt_peft.adapters import (
    add_hyperparameters,
    add_selection,
    fold_scales,
    use_pseudo_svd,
)
from hyperopt_peft.problems import hyperparameters, rank_selection
from hyperopt_peft.problems.bilora import SingularValues, SingularVectors
from hyperopt_peft.problems.common import Adapter
from hyperopt_peft.problems.data_sources import Mixture, SourceWeights, Target
from hyperopt_peft.problems.reweighting import Clean, SampleWeights, Weighted
from hyperopt_peft.trainer.folds import FoldRow, weighted
from tests.support.class_weights import Stream
from tests.support.networks import differences
from tests.support.resume import end, interrupted, require_same_end, saving
from tests.support.trainers import (
    base_model,
    data,
    peft_model,
    trainer,
    values,
)

FOLDS = 3


def folded(folder: Path, **options: Any) -> Any:
    """A `BiDoRATrainer` of 16 lower and 8 trusted rows in float64, without dropout."""
    kind = options.get("kind", "classes")
    model = options.pop("model", None) or peft_model(kind, 0.0).double()
    return trainer(folder, model=model, cross_fit=FOLDS, upper_fraction=1 / 3, **options)


def losses_of(made: Any, rows: Any, fold: int) -> tuple[Tensor, int]:
    """The summed loss of the labels in ``rows`` by the fold's adapter, and their number."""
    batch = made.data_collator(rows)
    shift = int(batch["labels"].dim() == 2)  # a causal model
    count = int((batch["labels"][..., shift:] != -100).sum())
    with made.folds.active(fold):
        loss: Tensor = made.model(**batch).loss
    return loss * count, count


@pytest.mark.parametrize("kind", ["classes", "regression", "causal"])
def test_losses_are_means_over_the_rows_of_each_fold(tmp_path: Path, kind: str) -> None:
    """Below over the rows that a fold does not hold out, above over those that it does."""
    made = folded(tmp_path, kind=kind)
    part = kind == "causal"
    below = [made.train_dataset[i] for i in (0, 3, 16, 17, 18, 19, 23)]
    above = [made.upper_dataset[i] for i in range(len(made.upper_dataset))]
    if part:  # rows of different numbers of labels
        for number, each in enumerate((*below, *above)):
            each.row["labels"] = [-100] * (number % 4) + each.row["labels"][number % 4 :]
    assert {len(each.folds) for each in above} == {1}
    assert [len(each.folds) for each in below] == [FOLDS] * 2 + [FOLDS - 1] * 5
    (batch,) = weighted(made, [made.data_collator(below)], above=False)
    total = torch.zeros((), dtype=torch.float64)
    for k in range(FOLDS):
        loss, count = losses_of(made, [each.row for each in below if k in each.folds], k)
        total = total + loss / count
    near = 1e-6 if part else 1e-12  # Llama computes its loss in float32
    assert float(made.lower.evaluate(batch)[0]) == pytest.approx(float(total), rel=near)
    (batch,) = weighted(made, [made.data_collator(above)], above=True)
    parts = [losses_of(made, [e.row for e in above if k in e.folds], k) for k in range(FOLDS)]
    mean = sum(loss for loss, _ in parts) / sum(count for _, count in parts)
    assert float(made.upper.evaluate(batch)[0]) == pytest.approx(float(mean), rel=near)


def test_a_held_out_row_does_not_move_the_adapter_of_its_fold(tmp_path: Path) -> None:
    """With another row in its place, only the other adapters' gradients change."""
    made = folded(tmp_path)
    rows = [made.train_dataset[i] for i in range(len(made.train_dataset))]

    def slopes(rows: Any) -> list[tuple[Tensor, ...]]:
        (batch,) = weighted(made, [made.data_collator(rows)], above=False)
        return [made.lower.gradient(batch, level.variables).gradient for level in made.lower.levels]

    before = slopes(rows)
    trusted = {row.folds: number for number, row in enumerate(rows) if len(row.folds) < FOLDS}
    assert len(trusted) == FOLDS
    for folds, number in trusted.items():
        other = {**rows[number].row, "input_ids": [7] * 6}
        after = slopes([*rows[:number], FoldRow(other, folds), *rows[number + 1 :]])
        for k in range(FOLDS):
            same = all(torch.equal(a, b) for a, b in zip(before[k], after[k], strict=True))
            assert same == (k not in folds)


def test_every_trusted_row_is_above_in_one_fold_and_classes_are_spread(tmp_path: Path) -> None:
    rows = data(rows=54)
    made = folded(
        tmp_path,
        options={
            "train_dataset": rows.select(range(36)),
            "upper_dataset": rows.select(range(36, 54)),
        },
    )
    above = [made.upper_dataset[i] for i in range(18)]
    assert [row.row["labels"] for row in above] == rows["labels"][36:]
    for k in range(FOLDS):
        assert sorted(e.row["labels"] for e in above if e.folds == (k,)) == [0, 0, 1, 1, 2, 2]
    below = [made.train_dataset[i] for i in range(54)]
    assert [e.row for e in below] == [rows[i] for i in range(54)]
    assert all(e.folds == (0, 1, 2) for e in below[:36])
    assert all({*b.folds, *a.folds} == {0, 1, 2} for b, a in zip(below[36:], above, strict=True))


@pytest.mark.parametrize("settings", [{}, {"gamma": 0.1, "upper_max_grad_norm": 0.1}])
def test_micro_batches_are_a_step_on_all_their_rows(tmp_path: Path, settings: Any) -> None:
    """Also where a fold's part of one is empty."""
    ends = []
    for batch, count in ((4, 1), (1, 4)):
        made = folded(
            tmp_path,
            per_device_train_batch_size=batch,
            per_device_upper_batch_size=4,
            gradient_accumulation_steps=count,
            hypergradient="cg:steps=4",
            max_grad_norm=0.5,
            **settings,
        )
        made.train()
        ends.append({n: v.detach().clone() for n, v in made.named_variables()})
    for name, value in ends[0].items():
        assert (ends[1][name] - value).norm() <= 1e-7 * value.norm(), name


def test_the_limit_of_the_norm_is_that_of_a_fold(tmp_path: Path) -> None:
    """√K times it for all: the length of K gradients that each have it."""
    made = folded(tmp_path, max_grad_norm=1e-3, max_steps=2)
    moved = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            slopes = [v.grad for v in made.lower.variables]
            moved.append(float(torch.stack([s.norm() for s in slopes]).norm()))

    made.add_callback(Norms())
    made.train()
    assert moved == pytest.approx([1e-3 * FOLDS**0.5] * 2, rel=1e-3)


def levels(name: str, model: Any) -> dict[str, Any]:
    """The two levels of a method, as functions of the trainer."""
    if name == "singular values":
        model = use_pseudo_svd(model)
        return {
            "lower": lambda t: SingularVectors(t.model, task_loss=t.task_loss),
            "upper": lambda t: SingularValues(t.model, task_loss=t.task_loss),
        }
    if name == "ranks":
        add_selection(model)
        return {
            "lower": lambda t: rank_selection.Components(t.model, decay=0.1, task_loss=t.task_loss),
            "upper": lambda t: rank_selection.Selection(t.model, task_loss=t.task_loss),
        }
    if name == "hyper-parameters":
        add_hyperparameters(model)

        def upper(t: Any) -> Problem:
            return hyperparameters.Hyperparameters(t.model, task_loss=t.task_loss)

        return {
            "lower": lambda t: hyperparameters.Regularised(
                t.model, upper(t), task_loss=t.task_loss
            ),
            "upper": upper,
        }
    if name == "example weights":
        weights: Any = SampleWeights(24)
        return {
            "lower": lambda t: Weighted(t.model, weights),
            "upper": lambda t: Clean(weights, t.model),
        }
    sources = SourceWeights({"web": 9, "books": 9})
    return {
        "lower": lambda t: Mixture(t.model, sources),
        "upper": lambda t: Target(sources, t.model),
    }


METHODS = ["singular values", "ranks", "hyper-parameters", "example weights", "sources"]


def of_method(folder: Path, name: str, callbacks: Any = (), **settings: Any) -> BilevelTrainer:
    model = peft_model(dora=False)
    rows = data()
    rows = rows.add_column("index", list(range(24))).add_column("source", [0, 1] * 12)
    given = {
        "max_steps": 5,
        "lower_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "upper_learning_rate": 1e-2,
        "hypergradient": "darts",
        "upper_fraction": 1 / 3,
        "cross_fit": FOLDS,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return BilevelTrainer(
        model,
        **levels(name, model),
        args=BilevelTrainingArguments(output_dir=str(folder), **given),
        train_dataset=rows,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_cross_fitted_without_knowing(tmp_path: Path, name: str) -> None:
    """Both levels move, every fold's adapter apart, and a plain adapter is left."""
    made = of_method(tmp_path, name)
    before = {n: v.detach().clone() for n, v in made.named_variables()}
    made.train()
    moved = {n for n, v in made.named_variables() if not torch.equal(v, before[n])}
    if name in ("example weights", "ranks", "hyper-parameters"):  # some are zero in a few steps
        assert any(n.startswith("upper.") for n in moved)
    else:
        assert moved == before.keys()
    firsts = [level.variables[0].detach() for level in made.lower.levels]  # type: ignore[attr-defined]
    assert not torch.equal(firsts[0], firsts[1]) and not torch.equal(firsts[1], firsts[2])
    model = made.model
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert not [n for n in model.state_dict() if "fold" in n]
    if name == "hyper-parameters":
        fold_scales(model)
    if name != "ranks":
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(base_model(), tmp_path / "adapter")
        ids = torch.tensor(data(rows=4)["input_ids"][:])
        expected = model.eval()(input_ids=ids).logits
        assert torch.allclose(loaded.eval()(input_ids=ids).logits, expected, atol=1e-5)


def test_the_adapter_that_is_left_is_the_mean_of_the_folds(tmp_path: Path) -> None:
    made = folded(tmp_path)
    made.train()
    found = dict(made.model.named_parameters())
    for name, variable in zip(
        made.lower.levels[0].names, made.lower.levels[0].variables, strict=True
    ):
        assert found[name] is variable
    with pytest.raises(ProblemError, match="another trainer"):
        made.train()


@pytest.mark.parametrize("retrain", ["warm", "scratch"])
def test_bidora_retrains_one_adapter_on_everything(tmp_path: Path, retrain: str) -> None:
    """From the mean of the folds', or from the initial values, with the magnitudes frozen."""
    made = trainer(tmp_path, cross_fit=FOLDS, retrain=retrain, retrain_steps=3, max_steps=4)
    start = values(made.model)
    made.train()
    again = made.retrainer
    assert len(again.train_dataset) == 24 and again.folds is None
    assert {len(row) for row in again.train_dataset} == {3}
    assert list(made.model.peft_config) == ["default"]
    magnitudes = [v for v in made.upper.variables]
    assert all(any(m is p for p in made.model.parameters()) for m in magnitudes)
    assert start.keys() > values(made.model).keys()  # the folds' are gone
    made.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "adapter", is_trainable=True)
    found = values(loaded)
    assert all(torch.equal(found[n], v) for n, v in values(made.model).items())


RUNS: dict[str, Any] = {
    "micro-batches": {"gradient_accumulation_steps": 2, "hypergradient": "cg:steps=2,damping=1.0"},
    "kept vector": {"hypergradient": "warm:damping=1.0"},
    "upper data at every step": {"hypergradient": "penalty:inner_steps=2", "upper_prior": 5.0},
    "the best model": {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "options": {"eval_dataset": data(rows=9, seed=5)},
    },
    "workers": {"dataloader_num_workers": 1},
}


SLOW = {"kept vector", "workers"}
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in RUNS]


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_search_is_bit_identical(tmp_path: Path, name: str) -> None:
    require_same_end(tmp_path, (4,), (8,), cross_fit=FOLDS, **RUNS[name])


def test_a_resumed_method_is_bit_identical(tmp_path: Path) -> None:
    def make(folder: Path, callbacks: Any = (), **settings: Any) -> Any:
        saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7}
        torch.manual_seed(5)
        return of_method(folder, "singular values", callbacks, **saves, **settings)

    whole = make(tmp_path / "whole")
    whole.train()
    interrupted(tmp_path / "broken", (3,), make)
    resumed = make(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(whole))


@pytest.mark.parametrize("stop", [(4,), (2, "retrain"), (4, "retrain")])
def test_both_phases_resume(tmp_path: Path, stop: Any) -> None:
    settings = {"cross_fit": FOLDS, "retrain": "warm", "retrain_steps": 6, "max_steps": 6}
    whole = saving(tmp_path / "whole", **settings)
    whole.train()
    interrupted(tmp_path / "broken", stop, **settings)
    resumed = saving(tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert list(resumed.model.peft_config) == ["default"]


def test_a_checkpoint_of_other_folds_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, (4,), cross_fit=FOLDS)
    with pytest.raises(ProblemError, match="cross_fit"):
        saving(tmp_path, cross_fit=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("method", ["direct", "cg:product=difference,steps=2"])
def test_gradient_checkpointing_runs_passes_again_with_the_folds_adapter(
    tmp_path: Path, method: str
) -> None:
    ends = []
    for checkpointing in (False, True):
        made = folded(
            tmp_path,
            hypergradient=method,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        made.train()
        ends.append({n: v.detach().clone() for n, v in made.named_variables()})
    for name, value in ends[0].items():
        assert (ends[1][name] - value).norm() <= 1e-9 * value.norm(), name


def test_a_control_without_an_upper_level_has_no_folds(tmp_path: Path) -> None:
    made = trainer(tmp_path, method="dora", cross_fit=FOLDS)
    made.train()
    assert made.folds is None and list(made.model.peft_config) == ["default"]


REFUSED: dict[str, Any] = {
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "dispatch_batches": {"accelerator_config": {"dispatch_batches": True}},
    "checkpointing": {"gradient_checkpointing": True, "hypergradient": "cg"},
    "9 folds of 8 rows": {"cross_fit": 9},
}


@pytest.mark.parametrize("named", REFUSED)
def test_a_setting_that_folds_exclude_is_named(tmp_path: Path, named: str) -> None:
    given = {"cross_fit": FOLDS, "upper_fraction": 1 / 3, **REFUSED[named]}
    with pytest.raises(ProblemError, match=named):
        trainer(tmp_path, **given)


def test_levels_that_are_no_functions_or_own_one_tensor_are_refused(tmp_path: Path) -> None:
    model = peft_model(dora=False)
    weights = SampleWeights(24)
    settings = {"cross_fit": 2, "max_steps": 4, "use_cpu": True}
    args = BilevelTrainingArguments(output_dir=str(tmp_path), **settings)

    def make(lower: Any, upper: Any, model: Any = model, **given: Any) -> None:
        rows = {"train_dataset": data(), **given}
        BilevelTrainer(model, lower=lower, upper=upper, args=args, **rows)

    with pytest.raises(ProblemError, match="functions"):
        make(Adapter(model), Clean(weights, model))
    with pytest.raises(ProblemError, match="PeftModel"):
        make(lambda t: Adapter(t.model), lambda t: Clean(weights, t.model), base_model())
    with pytest.raises(ProblemError, match="stream"):
        make(
            lambda t: Adapter(t.model),
            lambda t: Clean(weights, t.model),
            train_dataset=Stream(8),
            upper_dataset=data(rows=8),
        )
    with pytest.raises(ProblemError, match="different tensors"):
        make(lambda t: Adapter(t.model), lambda t: Clean(SampleWeights(24), t.model))
    model = peft_model(dora=False)
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            parameter.requires_grad_(True)
    with pytest.raises(ProblemError, match=r"LayerNorm.*of its own"):
        make(lambda t: Adapter(t.model), lambda t: Clean(weights, t.model), model)
