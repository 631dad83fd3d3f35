"""Interrupted and resumed, a Trainer's run is bit-identical to one that was left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from hyperopt_peft import (
    BilevelTrainer,
    BilevelTrainingArguments,
    Problem,
    ProblemError,
)
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.engine.checkpoint import MANIFEST, last_valid, verify_manifest
from tests.support.networks import differences
from tests.support.resume import Stop, StopAt, end, interrupted, require_same_end, saving
from tests.support.trainers import base_model, data

RUNS = {
    "plain": {},
    "micro-batches": {"gradient_accumulation_steps": 2},
    "micro-batches, a last step of one": {"gradient_accumulation_steps": 2, "rows": 26},
    "no log": {"logging_strategy": "no"},
    "the regulariser's numbers": {"gamma": 1e-3, "lower_steps": 3},
    "products": {"hypergradient": "cg:steps=2,damping=1.0"},
    "a vector kept between upper steps": {"hypergradient": "warm:damping=1.0", "lower_steps": 2},
    "inner runs": {"hypergradient": "f2sa:inner_steps=2"},
    "the upper level's data at every step": {
        "hypergradient": "penalty:inner_steps=2",
        "gradient_accumulation_steps": 2,
    },
    "a prior": {"upper_prior": 30.0},
    "PEFT's layer": {"fast_dora": False, "norm_grad": "detach"},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "constant rate": {"lr_scheduler_type": "constant"},
    "tokens counted": {"include_num_input_tokens_seen": "all"},
    "evaluation": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "options": {"eval_dataset": data(rows=9, seed=5)},
    },
    "dispatched batches": {"accelerator_config": {"dispatch_batches": True}, "rows": 20},
    "dora": {"method": "dora"},
    "lora": {"method": "lora"},
    "the other tasks": {"kind": "causal"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_search_is_bit_identical(tmp_path: Path, name: Any) -> None:
    """Stopped before a save, in between, and again after it was resumed."""
    require_same_end(tmp_path, (4,), (6,), (8,), **RUNS[name])


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (None, "written without estimator.pt"),
        ({"v": [torch.ones(2)], "k": 1}, "'v'"),
        ({"k": 1}, "'direction'"),
        ([], "mapping"),
    ],
)
def test_what_the_estimator_kept_must_fit(tmp_path: Path, kept: Any, message: Any) -> None:
    interrupted(tmp_path, (4,), hypergradient="warm")
    folder = tmp_path / "checkpoint-3"
    record = verify_manifest(folder)
    shapes = [x.shape for x in checkpoint.read_state(folder / "estimator.pt")["v"]]
    made = saving(tmp_path, hypergradient="warm")
    assert shapes == [x.shape for x in made.lower.variables]
    (folder / "estimator.pt").unlink()
    if kept is not None:
        checkpoint.write_state(folder / "estimator.pt", kept)
    checkpoint.write_manifest(folder, record)
    with pytest.raises(ProblemError, match=message):
        made.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("stop", [4, 5, 6, 8])
def test_epochs_begin_and_end_anywhere(tmp_path: Path, stop: Any) -> None:
    """Five steps an epoch, saved at the end of each."""
    settings = {"rows": 25, "save_strategy": "epoch", "max_steps": 11, "logging_steps": 5}
    require_same_end(tmp_path, (6,), **settings)
    settings = {"rows": 20, "save_steps": 1, "max_steps": -1, "num_train_epochs": 2.25}
    settings["logging_steps"] = 1
    require_same_end(tmp_path / "steps", (stop,), **settings)


@pytest.mark.parametrize("retrain", ["warm", "scratch"])
@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([(7, "search")], id="in the search"),
        pytest.param([(2, "retrain")], id="before the retraining's first checkpoint"),
        pytest.param([(5, "retrain"), (7, "retrain")], id="in the retraining"),
        pytest.param([(4, "search"), (1, "retrain"), (4, "retrain")], id="in both"),
    ],
)
def test_both_phases_resume(tmp_path: Path, retrain: Any, stops: Any) -> None:
    settings = {"retrain_learning_rate": 5e-3, "gradient_accumulation_steps": 2, "rows": 30}
    require_same_end(tmp_path, *stops, retrain=retrain, **settings)


def test_a_finished_run_takes_no_step_more(tmp_path: Path) -> None:
    """Neither within an epoch, nor at its end, nor where the rate is not zero by then."""
    for steps, rows in ((9, 25), (10, 25)):
        settings = {"max_steps": steps, "rows": rows, "lr_scheduler_type": "constant"}
        folder = tmp_path / str(steps)
        require_same_end(folder, **settings, resume=None)
        resumed = saving(folder / "whole", **settings)
        resumed.train(resume_from_checkpoint=True)
        again = saving(folder / "broken", **settings)
        again.train(resume_from_checkpoint=str(folder / "broken" / f"checkpoint-{steps}"))
        assert resumed.state.global_step == steps
        assert not differences(end(resumed), end(again))


class Weighted(Problem):
    """Cross-entropy with a weight for each class, which no module holds."""

    def __init__(
        self, model: Any, weights: Any, variables: Any, *, weighted: Any, name: Any
    ) -> None:
        self.model, self.weights, self.weighted = model, weights, weighted
        super().__init__(variables, name=name)

    def loss(self, batch: Any) -> Any:
        batch = dict(batch)
        labels = batch.pop("labels")
        losses = cross_entropy(self.model(**batch).logits, labels, reduction="none")
        return (losses * self.weights[labels].exp()).mean() if self.weighted else losses.mean()


def reweighting(folder: Path, callbacks: Any = (), **settings: Any) -> Any:
    """The lower level trains a whole model, the upper one owns the classes' weights."""
    model, weights = base_model(), nn.Parameter(torch.zeros(3))
    lower = Weighted(model, weights, model.named_parameters(), weighted=True, name="below")
    upper = Weighted(model, weights, [("classes", weights)], weighted=False, name="above")
    options = {
        "max_steps": 8,
        "save_steps": 3,
        "logging_steps": 3,
        "upper_learning_rate": 0.1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    made = BilevelTrainer(
        model,
        lower=lower,
        upper=upper,
        args=BilevelTrainingArguments(output_dir=str(folder), **{**options, **settings}),
        train_dataset=data().with_format("torch"),
        callbacks=list(callbacks),
        eval_dataset=data(rows=9, seed=5),
    )
    made.remove_callback(PrinterCallback)
    return made


def test_upper_variables_outside_the_model_resume(tmp_path: Path) -> None:
    _, resumed = require_same_end(tmp_path, (4,), (7,), make=reweighting)
    assert resumed.upper.variables[0].abs().min() > 0.01


def test_gradients_of_variables_outside_the_model_do_not_add_up(tmp_path: Path) -> None:
    """The Trainer empties those of its model alone; emptied by hand, nothing is different."""

    class Empty(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            by_hand.upper.variables[0].grad = None

    made = reweighting(tmp_path / "made")
    made.train()
    by_hand = reweighting(tmp_path / "by hand", [Empty()])
    by_hand.train()
    assert not differences(end(made), end(by_hand))


BEST = {
    "logging_steps": 2,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "load_best_model_at_end": True,
    "save_total_limit": 1,
}


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """Also where its checkpoint is older than the one that was resumed from."""
    options = {"eval_dataset": data(rows=9, seed=5)}
    settings = {**BEST, "metric_for_best_model": "eval_loss", "learning_rate": 0.3}
    whole, resumed = require_same_end(tmp_path, (4,), (7,), options=options, **settings)
    best = whole.state.best_model_checkpoint
    assert 0 < whole.state.best_global_step < 8
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert best.rpartition("-")[2] == str(whole.state.best_global_step) and verify_manifest(
        tmp_path / "whole" / f"checkpoint-{whole.state.best_global_step}"
    )


def test_the_best_variables_outside_the_model_are_loaded_too(tmp_path: Path) -> None:
    weights = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weights[state.global_step] = made.upper.variables[0].detach().clone()

    made = reweighting(tmp_path, [Keep()], **BEST, learning_rate=0.1)
    made.train()
    best = made.state.best_global_step
    assert best < 8 and torch.equal(made.upper.variables[0], weights[best])


def test_a_damaged_best_model_is_one_error(tmp_path: Path) -> None:
    class Damage(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                path = tmp_path / f"checkpoint-{state.best_global_step}" / "levels.safetensors"
                path.write_bytes(path.read_bytes()[:-1])

    made = reweighting(tmp_path, [Damage()], **BEST, learning_rate=0.1)
    with pytest.raises(ProblemError, match=r"levels\.safetensors"):
        made.train()


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, write = [], checkpoint.write_manifest

    def look(folder: Path, record: Any) -> None:
        assert not (folder / MANIFEST).exists()
        seen.append((last_valid(tmp_path), folder.name))
        write(folder, record)

    monkeypatch.setattr(checkpoint, "write_manifest", look)
    saving(tmp_path, save_total_limit=1).train()
    steps = ("checkpoint-3", "checkpoint-6", "checkpoint-9")
    before = (None, tmp_path / "checkpoint-3", tmp_path / "checkpoint-6")
    assert seen == list(zip(before, steps))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]


def test_a_run_resumes_itself_and_not_a_longer_one_before_it(tmp_path: Path) -> None:
    expected = saving(tmp_path / "alone")
    expected.train()
    saving(tmp_path / "shared", max_steps=12, upper_learning_rate=0.5, retrain="warm").train()
    made = saving(tmp_path / "shared", [StopAt(5)])
    with pytest.raises(Stop):
        made.train()
    resumed = saving(tmp_path / "shared")
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(expected))


def test_a_run_does_not_take_up_the_retraining_of_one_before_it(tmp_path: Path) -> None:
    expected = saving(tmp_path / "alone", retrain="warm")
    expected.train()
    saving(tmp_path / "shared", upper_learning_rate=0.5, retrain="warm").train()
    made = saving(tmp_path / "shared", [StopAt(5)], retrain="warm")
    with pytest.raises(Stop):
        made.train()
    resumed = saving(tmp_path / "shared", retrain="warm")
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(expected))


@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-6"])
def test_any_checkpoint_can_be_named(tmp_path: Path, name: Any) -> None:
    expected = saving(tmp_path)
    expected.train()
    resumed = saving(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / name))
    assert not differences(end(resumed), end(expected))


def test_a_checkpoint_of_the_retraining_can_be_named(tmp_path: Path) -> None:
    expected = saving(tmp_path, retrain="warm")
    expected.train()
    resumed = saving(tmp_path, retrain="warm")
    resumed.train(resume_from_checkpoint=str(tmp_path / "retrain" / "checkpoint-3"))
    assert not differences(end(resumed), end(expected))
    assert "loss" not in str(resumed.state.log_history)  # the search was not run again


def test_early_stopping_counts_on(tmp_path: Path) -> None:
    """Two evaluations without a better score end a run, wherever it was interrupted."""

    def stopping(folder: Path, callbacks: Any = ()) -> Any:
        def score(prediction: Any) -> Any:
            return {"score": -made.state.global_step}

        options = {"eval_dataset": data(rows=9, seed=5), "compute_metrics": score}
        callbacks = [EarlyStoppingCallback(early_stopping_patience=2), *callbacks]
        settings = {**BEST, "metric_for_best_model": "score", "greater_is_better": True}
        made = saving(folder, callbacks, options=options, **settings)
        return made

    whole, resumed = require_same_end(tmp_path, (5,), make=stopping)
    assert whole.state.global_step == resumed.state.global_step == 6


def test_the_checkpoint_that_is_taken_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path, (5,))
    saving(tmp_path).train(resume_from_checkpoint=True)
    assert str(tmp_path / "checkpoint-3") in caplog.text


def test_an_epoch_that_a_callback_ended_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Five steps an epoch, of which the first has three."""

    class Leave(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step == 3

    settings = {"rows": 25, "save_steps": 1, "logging_steps": 1}
    with pytest.raises(Stop):
        saving(tmp_path, [Leave(), StopAt(5)], **settings).train()
    resumed = saving(tmp_path, [Leave()], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert "should_epoch_stop" in caplog.text and resumed.state.global_step == 9
