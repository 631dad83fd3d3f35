"""Interrupted and resumed, a Trainer's run is bit-identical to one that was left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from hyperopt_peft import ProblemError
from hyperopt_peft.engine.checkpoint import last_valid
from hyperopt_peft.problems import AutoLoRA, LayerScales
from tests.support.class_weights import rows, streamed
from tests.support.methods import RowWeights, method_trainer
from tests.support.networks import differences
from tests.support.resume import Stop, StopAt, end, interrupted, logs_of, require_same_end, saving
from tests.support.trainers import data, sampling


def reweighting(folder: Path, callbacks: Any = (), **settings: Any) -> Any:
    """The upper level owns weights of classes, which are outside the model.

    The labels of the evaluation set are wrong, so that its loss rises.
    """
    wrong = [{**row, "labels": (row["labels"] + 1) % 3} for row in rows(64, 2)]
    options = {"data": rows(64, 0), "evaluation": wrong, "max_steps": 8, "logging_steps": 3}
    return streamed(folder, callbacks, **{**options, **settings})


def of_method(kind: Any) -> Any:
    """A function that makes a trainer of the method."""
    return lambda folder, callbacks=(), **settings: method_trainer(
        folder, callbacks, method=kind(), save_strategy="steps", save_steps=3, **settings
    )


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
# Each stopped in its fourth step, between two checkpoints, and in its eighth, in an epoch of five.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"stops": [(4,), (6,), (8,)]},
    "micro-batches, a last step of one, metrics of a level": {
        "gradient_accumulation_steps": 2,
        "rows": 26,
        "gamma": 1e-3,
        "lower_steps": 3,
    },
    "a vector kept between upper steps": {"hypergradient": "warm:damping=4.0", "lower_steps": 2},
    "an estimator with a state, evaluation": {
        "hypergradient": "f2sa:inner_steps=2",
        "gradient_accumulation_steps": 2,
        "options": {"eval_dataset": data(rows=9, seed=5)},
        **EVALUATED,
    },
    "tokens counted": {"include_num_input_tokens_seen": "all", "kind": "causal"},
    "dispatched batches": {"accelerator_config": {"dispatch_batches": True}, "rows": 20},
    "a sampler without a seed": {
        "accelerator_config": {"use_seedable_sampler": False},
        "rows": 25,
        "max_steps": 13,
    },
    "a sampler by length": {**sampling("group_by_length"), "rows": 25, "max_steps": 13},
    "one level": {"method": "dora"},
    "a checkpoint an epoch": {
        "save_strategy": "epoch",
        "logging_steps": 5,
        "rows": 25,
        "max_steps": 11,
        "stops": [(6,), (10,)],
    },
    "a fraction of an epoch": {
        "num_train_epochs": 2.25,
        "max_steps": -1,
        "save_steps": 1,
        "logging_steps": 1,
        "stops": [(4,), (6,), (8,)],
    },
    # Within a pass over the stream, whose last batch is not full, and after that batch.
    "a stream": {
        "make": streamed,
        "count": 22,
        "gradient_accumulation_steps": 2,
        "save_steps": 1,
        "stops": [(2,), (4,), (6,)],
    },
    "variables outside the model": {"make": reweighting, "max_steps": 8},
    "scales": {"make": of_method(LayerScales), "retrain": "warm", "stops": [(4, "search")]},
    "gates": {"make": of_method(AutoLoRA), "retrain": "warm", "stops": [(5, "retrain")]},
    "weights of rows, on which the second phase's rows depend": {
        "make": of_method(RowWeights),
        "retrain": "scratch",
        "stops": [(2, "search"), (4, "retrain")],
    },
    "retraining from scratch": {
        "retrain": "scratch",
        "gradient_accumulation_steps": 2,
        "rows": 30,
        "stops": [(4, "search"), (1, "retrain"), (5, "retrain")],
    },
}


FAST = {"plain", "micro-batches, a last step of one, metrics of a level", "a stream"}
FAST |= {"retraining from scratch", "scales", "gates"}
FAST |= {"weights of rows, on which the second phase's rows depend"}


@pytest.mark.filterwarnings("ignore:f2sa. the relative residual")
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RUNS]
)
def test_a_resumed_run_is_bit_identical(tmp_path: Path, name: str) -> None:
    """Twice N steps are N steps, a stop, and N more."""
    settings = {"stops": [(4,), (8,)], **RUNS[name]}
    require_same_end(tmp_path, *settings.pop("stops"), **settings)


def test_a_finished_run_takes_no_step_more(tmp_path: Path) -> None:
    """Neither within an epoch, nor at its end, nor where the rate is not zero by then."""
    for steps in (9, 10):
        settings = {"max_steps": steps, "rows": 25, "lr_scheduler_type": "constant"}
        alone = saving(tmp_path / str(steps), **settings)
        alone.train()
        resumed = saving(tmp_path / str(steps), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"{steps}" / f"checkpoint-{steps}"))
        assert resumed.state.global_step == steps
        assert not differences(end(resumed)["values"], end(alone)["values"])


BEST = {"logging_steps": 2, "save_steps": 2, "load_best_model_at_end": True, **EVALUATED}
BEST |= {"save_total_limit": 1}


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """Also where its checkpoint is older than the one that was resumed from."""
    options = {"eval_dataset": data(rows=9, seed=5)}
    settings = {**BEST, "metric_for_best_model": "eval_loss", "learning_rate": 0.3}
    alone, resumed = require_same_end(tmp_path, (4,), (7,), options=options, **settings)
    best = alone.state.best_global_step
    assert 0 < best < 8 and resumed.state.best_global_step == best
    assert alone.state.best_model_checkpoint == str(tmp_path / "alone" / f"checkpoint-{best}")


def test_a_damaged_best_model_is_one_error(tmp_path: Path) -> None:
    class Damage(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                path = tmp_path / f"checkpoint-{state.best_global_step}" / "levels.safetensors"
                path.write_bytes(path.read_bytes()[:-1])

    made = reweighting(tmp_path, [Damage()], **BEST, learning_rate=0.1)
    with pytest.raises(ProblemError, match=r"levels\.safetensors"):
        made.train()


def test_a_run_resumes_itself_and_not_the_one_before_it(tmp_path: Path) -> None:
    """Neither a longer one in the same folder, nor its retraining."""
    expected = saving(tmp_path / "alone", retrain="warm")
    expected.train()
    earlier = {"max_steps": 12, "upper_learning_rate": 0.5, "retrain": "warm"}
    saving(tmp_path / "shared", **earlier).train()
    with pytest.raises(Stop):
        saving(tmp_path / "shared", [StopAt(5)], retrain="warm").train()
    resumed = saving(tmp_path / "shared", retrain="warm")
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(expected))


def test_a_checkpoint_of_the_retraining_can_be_named(tmp_path: Path) -> None:
    expected = saving(tmp_path, retrain="warm")
    expected.train()
    resumed = saving(tmp_path, retrain="warm")
    resumed.train(resume_from_checkpoint=str(tmp_path / "retrain" / "checkpoint-3"))
    assert not differences(end(resumed), end(expected))
    assert "loss" not in str(resumed.state.log_history)  # the search was not run again


def test_early_stopping_counts_on_and_ends_with_the_best_levels(tmp_path: Path) -> None:
    """Two evaluations without a better loss end a run, wherever it was interrupted."""

    def make(folder: Path, callbacks: Any = ()) -> Any:
        callbacks = [EarlyStoppingCallback(early_stopping_patience=2), *callbacks]
        settings = {**BEST, "metric_for_best_model": "loss", "learning_rate": 0.1}
        return reweighting(folder, callbacks, **settings)

    for run in require_same_end(tmp_path, (5,), make=make):
        assert (run.state.global_step, run.state.best_global_step) == (6, 2)
        best = load_file(Path(run.state.best_model_checkpoint) / "levels.safetensors")
        assert all(torch.equal(value, best[name]) for name, value in run.named_tensors())


def test_a_resumed_run_pulls_to_the_first_run_s_initial_values(tmp_path: Path) -> None:
    """Not to the values of the checkpoint, nor to those of the program that goes on."""

    def make(folder: Path, callbacks: Any = (), *, start: float = 1.0) -> Any:
        made = reweighting(folder, callbacks, upper_prior=50.0, upper_max_grad_norm=0.0)
        with torch.no_grad():
            for start_or_weight in (*made.upper.variables, *made.upper.prior.start):
                start_or_weight[0] = start
        return made

    alone = make(tmp_path / "alone")
    alone.train()
    interrupted(tmp_path / "broken", (5,), make)
    resumed = make(tmp_path / "broken", start=7.0)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(alone))
    assert not differences(logs_of(resumed), logs_of(alone))
    assert resumed.upper.prior.start[0].tolist() == [1.0, -1.0, 0.0]
    with pytest.raises(ProblemError, match=r"^[\w ]*prior"):
        reweighting(tmp_path / "broken", upper_max_grad_norm=0.0).train(True)


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
    assert f"resuming from {tmp_path / 'checkpoint-4'}" in caplog.text
    assert "should_epoch_stop" in caplog.text and resumed.state.global_step == 9


def test_the_arguments_are_the_users_on_disk_and_in_memory(tmp_path: Path) -> None:
    during = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            during.append((args_of_user.max_grad_norm, args_of_user.save_total_limit))

    run = saving(tmp_path, [Look()], max_grad_norm=0.7, save_total_limit=3)
    args_of_user, before = run.args, vars(run.args).copy()
    run.train()
    run.save_model()
    assert during == [(0.7, 3)] * 9 and run.args is args_of_user and vars(args_of_user) == before
    for folder in (tmp_path, *tmp_path.glob("checkpoint-*")):
        loaded = torch.load(folder / "training_args.bin", weights_only=False)
        assert loaded.to_dict() == args_of_user.to_dict()
    assert "max_grad_norm" in loaded.to_dict()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3


def test_a_run_goes_on_from_the_checkpoint_that_a_signal_asked_for(tmp_path: Path) -> None:
    """And a search that has not ended is not followed by a retraining."""

    class Ask(TrainerCallback):
        """As SIGTERM does, three seconds later."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4 and not args.output_dir.endswith("retrain"):
                callbacks = made.callback_handler.callbacks
                (callback,) = [c for c in callbacks if type(c).__name__ == "JITCheckpointCallback"]
                callback.jit_manager.is_checkpoint_requested = True

    settings = {"enable_jit_checkpoint": True, "save_steps": 100, "retrain": "warm"}
    alone = saving(tmp_path / "alone", **settings)
    alone.train()
    made = saving(tmp_path / "broken", [Ask()], **settings)
    made.train()
    assert made.state.global_step < 9 and made.retrainer is None
    assert last_valid(tmp_path / "broken").name == "checkpoint-4"
    resumed = saving(tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(alone))
