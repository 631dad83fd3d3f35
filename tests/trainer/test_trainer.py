"""`BilevelTrainer`: what it moves the variables by, and that what it inherits keeps its meaning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hyperopt_peft import hypergradient
from hyperopt_peft.adapters import split_parameters
from tests.support.class_weights import pair
from tests.support.trainers import QUIET, data, peft_model, trainer, values
from tests.support.watch import SGD, batches_of, replayed, watched


# A solve that stops early is the same early.
@pytest.mark.filterwarnings("ignore::hyperopt_peft.errors.HypergradientWarning")
@pytest.mark.parametrize(
    ("method", "prior"),
    [
        ("darts:scheme=forward", 50.0),
        ("darts:product=exact,xi=lr", None),
        ("cg:steps=3", 50.0),
    ],
)
def test_the_variables_move_by_gradient_and_hypergradient_at_one_point(
    tmp_path: Path, method: str, prior: float | None
) -> None:
    """With `upper_prior` those of a level with a prior, which the logs have apart."""
    settings = {"hypergradient": method, "per_device_upper_batch_size": 4, "upper_prior": prior}
    run, watch = watched(tmp_path, peft_model(dropout=0.0).double(), **settings)
    lower_batches = batches_of(run, 6)
    start = values(run.model)
    run.train()
    assert all(torch.equal(start[n], watch.points[0][n]) for n in start)
    lower, upper, move = replayed(watch, prior)
    logs = [record for record in run.state.log_history if "upper_loss" in record]
    for step in range(6):
        move(step)
        expected = lower.gradient(lower_batches[step], lower.variables).gradient
        for name, part in zip(lower.names, expected, strict=True):
            torch.testing.assert_close(watch.gradients[step][name], part, rtol=1e-9, atol=1e-12)
        if step % 2 == 0:
            assert all(watch.gradients[step][name] is None for name in upper.names)
            continue
        lower.optimizer = torch.optim.SGD(lower.variables, lr=1e-2 * (1 - step / 6))
        above = run.upper_batches.batch(step // 2)
        batches = {"upper_batch": above, "lower_batch": lower_batches[step]}
        expected = hypergradient(upper, lower, method, **batches)
        lower.optimizer = None
        for name, part in zip(upper.names, expected, strict=True):
            torch.testing.assert_close(watch.gradients[step][name], part, rtol=1e-6, atol=1e-9)
        evaluation, log = upper.gradient(above, upper.variables), logs[step // 2]
        pull = evaluation.metrics.get("prior", 0.0)
        assert log.get("upper_prior", 0.0) == pytest.approx(pull, rel=1e-9)
        assert log["upper_loss"] == pytest.approx(evaluation.loss - pull, rel=1e-9)
    assert prior is None or logs[0]["upper_prior"] == 0 < logs[1]["upper_prior"]


def test_both_levels_have_their_own_rate(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "upper_learning_rate": 0.3}
    run, watch = watched(tmp_path, peft_model(dropout=0.0).double(), **settings)
    run.train()
    end = values(run.model)
    below = split_parameters(run.model)
    for name, before in watch.points[1].items():
        # The linear schedule is at 1 in the first step and at 1/2 in the second one.
        rate = 0.15 if name in below.magnitudes else 0.5e-2
        moved = before - rate * watch.gradients[1][name]
        torch.testing.assert_close(end[name], moved, rtol=1e-12, atol=1e-14)


def test_dropout_masks_are_those_of_the_lower_step(tmp_path: Path) -> None:
    """A difference over other masks than ∂f/∂u's would be noise of size 1/ε."""
    ends = {}
    for method in ("darts:product=exact", "darts", "darts:scheme=forward"):
        settings = {"hypergradient": method, "gradient_accumulation_steps": 2, **SGD}
        run = trainer(tmp_path, model=peft_model(dropout=0.2).double(), **settings)
        run.train()
        ends[method] = split_parameters(run.model).magnitudes
    for method, tolerance in (("darts", 1e-7), ("darts:scheme=forward", 1e-5)):
        for name, value in ends[method].items():
            exact = ends["darts:product=exact"][name]
            torch.testing.assert_close(value, exact, rtol=tolerance, atol=tolerance)


def test_one_level_alone_is_the_trainer_itself(tmp_path: Path) -> None:
    """Same batches, masks, schedule, clipping and logs, bit by bit."""
    settings = {"max_steps": 7, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "warmup_steps": 2}
    settings = {**QUIET, **settings, "logging_steps": 2, "seed": 3}
    args = TrainingArguments(str(tmp_path / "plain"), **settings)
    plain = Trainer(peft_model(), args, train_dataset=data())
    # The model's loss takes no num_items_in_batch into account where every micro-batch is full.
    plain.model_accepts_loss_kwargs = False
    plain.train()
    run = trainer(tmp_path / "ours", method="dora", fast_dora=False, **settings)
    run.train()
    ours, theirs = values(run.model), values(plain.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    keys = ("loss", "grad_norm", "learning_rate", "epoch", "step")
    logs = [
        [[record.get(key) for key in keys] for record in t.state.log_history if "loss" in record]
        for t in (run, plain)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3


def test_each_level_is_clipped_apart(tmp_path: Path) -> None:
    run, watch = watched(
        tmp_path, peft_model(dropout=0.0), max_grad_norm=0.5, upper_max_grad_norm=0.01
    )
    run.train()
    magnitudes = split_parameters(run.model).magnitudes
    logged = [r["upper_grad_norm"] for r in run.state.log_history if "upper_grad_norm" in r]
    assert len(logged) == 3
    assert min(logged) > 0.01  # before clipping
    for step, gradient in enumerate(watch.gradients):
        below = [g.norm() for n, g in gradient.items() if n not in magnitudes]
        above = [g.norm() for n, g in gradient.items() if n in magnitudes and g is not None]
        assert torch.stack(below).norm() == pytest.approx(
            min(0.5, run.state.log_history[step]["grad_norm"]), rel=1e-4
        )
        assert not above or torch.stack(above).norm() == pytest.approx(0.01, rel=1e-3)


def test_levels_by_the_model_s_own_names_get_the_decay_of_the_trainer(tmp_path: Path) -> None:
    run, _ = pair(tmp_path, weight_decay=0.5, upper_weight_decay=0.25)
    groups = run.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0, 0.25]
    assert [group["lr"] for group in groups] == [0.1, 0.1, 0.1]


@pytest.mark.filterwarnings("ignore::hyperopt_peft.errors.HypergradientWarning")
def test_settings_go_to_their_own_file_and_the_model_card(tmp_path: Path) -> None:
    run = trainer(tmp_path, hypergradient="cg:steps=2,damping=1.0")
    run.train()
    run.save_model()
    run.create_model_card()
    settings = json.loads((tmp_path / "bilevel_settings.json").read_text())
    assert settings == run.args.bilevel_settings()
    assert settings["hypergradient"] == "cg:steps=2,damping=1.0"
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "learning_rate" not in settings and not settings.keys() & adapter.keys()
    assert "- hypergradient: cg:steps=2,damping=1.0" in (tmp_path / "README.md").read_text()
