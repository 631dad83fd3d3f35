"""One loss everywhere: what the Trainer would train, at both levels and in each hypergradient."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, default_data_collator

from hyperopt_peft import BiDoRA, BilevelTrainer, bilevel
from tests.support.trainers import QUIET, arguments, data, peft_model, ragged, trainer, values
from tests.support.watch import SGD, Watch


class Hundredfold(Trainer):
    """A loss of one's own, a hundred times the model's."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, **kwargs)
        return (100 * result[0], result[1]) if return_outputs else 100 * result


def trained(
    method: Any, folder: Path, *, make: Any = BilevelTrainer, table: Any = None, **settings: Any
) -> Any:
    """A run of three steps in float64, its gradients, and the logs of the search."""
    watch, options = Watch(), settings.pop("options", {})
    kind = settings.pop("kind", "classes")
    run = make(
        settings.pop("model", None) or peft_model(kind, dropout=0.0).double(),
        arguments(folder, **{**SGD, "max_steps": 3, "lower_steps": 1, **settings}),
        method=method,
        train_dataset=data() if table is None else table,
        eval_dataset=data(rows=6, seed=5),
        callbacks=[watch],
        **options,
    )
    run.train()
    return run, watch.gradients, [log for log in run.state.log_history if "loss" in log]


def test_a_loss_of_the_parent_s_own_is_that_of_both_levels_and_phases(tmp_path: Path) -> None:
    """Each loss and the upper gradient are a hundred times the model's own, also in a solve."""
    settings = {"learning_rate": 0.0, "upper_learning_rate": 0.0, "weight_decay": 0.0}
    settings |= {"hypergradient": "cg:steps=2,product=difference", "retrain": "warm"}
    plain, gradients, logs = trained(BiDoRA(), tmp_path / "plain", **settings)
    run, ours, own = trained(BiDoRA(), tmp_path / "own", make=bilevel(Hundredfold), **settings)
    logs.append(plain.retrainer.state.log_history[0])
    own.append(run.retrainer.state.log_history[0])
    for log, other in zip(own, logs, strict=True):
        assert log["loss"] == pytest.approx(100 * other["loss"], rel=1e-5, abs=6e-3)
        upper = 100 * other.get("upper_loss", 0.0)
        assert log.get("upper_loss", 0.0) == pytest.approx(upper, rel=1e-5)
    for gradient, expected in zip(ours[:3], gradients[:3], strict=True):
        for name in [name for name in gradient if "magnitude" in name]:
            torch.testing.assert_close(gradient[name], 100 * expected[name], rtol=1e-5, atol=1e-7)
    assert run.evaluate()["eval_loss"] > 50


def by_sum(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """The sum over the labels divided by their number in the step, as the Trainer asks for."""
    assert num_items_in_batch is not None
    logits = outputs["logits"]
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / num_items_in_batch


def stock(folder: Path, table: Dataset, kind: str, options: Any = None, **settings: Any) -> Any:
    common = {**QUIET, "learning_rate": 1e-2, "seed": 3, **settings}
    model, args = peft_model(kind, dropout=0.0).double(), TrainingArguments(str(folder), **common)
    run = Trainer(model, args, train_dataset=table, **(options or {}))
    run.train()
    return run


def mean(outputs: Any, labels: Any, shift: int = 0, **options: Any) -> Any:
    """The exact mean over the labels of a batch."""
    options.pop("num_items_in_batch", None)
    logits = outputs["logits"]
    if labels.dim() > 1:
        logits = logits[:, : logits.shape[1] - shift].flatten(0, 1)
    return cross_entropy(logits, labels[..., shift:].flatten(), **options)


@pytest.mark.parametrize(
    ("table", "kind", "options", "exact", "smoothing"),
    [
        (ragged("tokens"), "tokens", {"compute_loss_func": by_sum}, mean, 0.0),
        (data(), "classes", {}, partial(mean, label_smoothing=0.3), 0.3),
        (ragged("causal"), "causal", {}, partial(mean, shift=1), 0.0),
    ],
)
def test_a_loss_that_counts_labels_is_the_mean_over_a_step(
    tmp_path: Path, table: Dataset, kind: str, options: Any, exact: Any, smoothing: float
) -> None:
    """Losses and variables are those of the stock Trainer with the exact mean over the labels.

    Its own loss under accumulation is another in some releases of Transformers.
    """
    common = {"max_steps": 4, "optim": "sgd", "max_grad_norm": 0.0}
    whole = {**common, "per_device_train_batch_size": 6}
    plain = stock(tmp_path / "plain", table, kind, {"compute_loss_func": exact}, **whole)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    settings = {**common, **parts, "label_smoothing_factor": smoothing}
    settings |= {"kind": kind, "table": table, "options": options}
    run, _, logs = trained(None, tmp_path / "ours", **settings)
    expected = [log["loss"] for log in plain.state.log_history if "loss" in log]
    assert [log["loss"] for log in logs] == pytest.approx(expected, rel=1e-6, abs=1.1e-4)
    for name, value in values(plain.model).items():
        torch.testing.assert_close(values(run.model)[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::hyperopt_peft.errors.HypergradientWarning")
@pytest.mark.parametrize(
    ("kind", "options"),
    [("classes", {}), ("tokens", {"compute_loss_func": by_sum}), ("causal", {}), ("seq2seq", {})],
)
def test_accumulation_is_a_mean_over_labels(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """Of both levels and in the hypergradient: one batch and its parts are the same step."""
    table, ends = data() if kind == "classes" else ragged(kind), []
    for size, micro in ((6, 1), (2, 3)):
        run, gradients, logs = trained(
            BiDoRA(gamma=0.1),
            tmp_path / str(size),
            kind=kind,
            table=table,
            hypergradient="cg:steps=2,damping=1.0",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=micro,
            per_device_upper_batch_size=4,
            options=dict(options),
        )
        ends.append((gradients, [log["loss"] for log in logs], values(run.model)))
    (gradients, losses, model), (parts, others, again) = ends
    assert others == pytest.approx(losses, rel=1e-6, abs=1.1e-4)
    for gradient, part in zip(gradients, parts, strict=True):
        for name, expected in gradient.items():
            torch.testing.assert_close(part[name], expected, rtol=1e-5, atol=1e-7)
    for name, value in model.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)


def test_a_causal_loss_without_a_count_is_a_mean_over_scored_labels(tmp_path: Path) -> None:
    """A row's first label is not scored, and the micro-batches differ in how many are."""
    model, rows = peft_model("causal", dropout=0.0).double(), ragged("causal", 6)
    model.get_base_model().accepts_loss_kwargs = False
    named = {name: x for name, x in model.named_parameters() if x.requires_grad}
    loss = model(**default_data_collator(list(rows))).loss
    expected = torch.autograd.grad(loss, [*named.values()])
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 1}
    _, gradients, _ = trained(None, tmp_path, model=model, table=rows, **settings)
    for name, value in zip(named, expected, strict=True):
        torch.testing.assert_close(gradients[0][name], value, rtol=1e-4, atol=1e-7)


def test_a_micro_batch_without_labels_of_a_language_model_counts_nothing(tmp_path: Path) -> None:
    table = data("causal")
    labels = [[-100] * 6 if row % 3 == 0 else label for row, label in enumerate(table["labels"][:])]
    feature = table.features["labels"]
    table = table.remove_columns("labels").add_column("labels", labels, feature=feature)
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    _, _, logs = trained(None, tmp_path, kind="causal", table=table, **settings)
    assert all(log["loss"] == log["loss"] for log in logs)


@pytest.mark.parametrize(("kind", "warned"), [("classes", True), ("causal", False)])
def test_a_step_is_the_mean_where_the_trainer_sums(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, warned: bool
) -> None:
    """A loss that ignores ``num_items_in_batch`` is the Trainer's sum over micro-batches."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    run = trainer(tmp_path / "ours", kind, dropout=0.0, method="dora", **settings)
    run.train()
    if warned:
        theirs = stock(tmp_path / "stock", data(kind), kind, max_steps=1, **settings)
        ratio = theirs.state.log_history[0]["loss"] / run.state.log_history[0]["loss"]
        assert ratio == pytest.approx(3, rel=1e-5)
    messages = [r.message for r in caplog.records if "num_items_in_batch" in r.message]
    assert len(messages) == warned
