"""What a `BilevelTrainer` logs of a step, of both levels and of their priors."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hyperopt_peft.adapters import split_parameters
from hyperopt_peft.errors import HypergradientWarning
from hyperopt_peft.trainer.logs import line_of
from tests.support.class_weights import Penalised, Plain, Weighted, pair, rows, streamed
from tests.support.trainers import data, peft_model, trainer
from tests.support.watch import watched


def logs(made: Any, key: str = "loss") -> Any:
    return [record for record in made.state.log_history if key in record]


def test_what_is_logged(tmp_path: Path) -> None:
    """A level's numbers are means over the steps as the loss is.

    The last step of an epoch has one micro-batch, the others have two.
    """
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5, "rows": 31}
    settings |= {"hypergradient": "cg:steps=2,damping=9.0", "gamma": 0.1, "logging_steps": 3}
    made = trainer(tmp_path, **settings)
    made.train()
    assert len(logs(made)) == 2
    for record in logs(made):
        expected = {"upper_loss", "upper_grad_norm", "upper_learning_rate", "implicit_ratio"}
        expected |= {"loss", "grad_norm", "learning_rate", "residual", "epoch", "step"}
        expected |= {"lower_task_loss", "lower_penalty", "lower_grad_norm", "solver_steps"}
        expected |= {"passes", "seconds"}
        assert expected <= record.keys() <= expected | {"upper_snr"}
        assert all(math.isfinite(value) for value in record.values())
        whole = record["lower_task_loss"] + 0.1 * record["lower_penalty"]
        assert record["loss"] == pytest.approx(whole, rel=1e-5)


def test_passes_and_seconds_go_on_through_both_phases(tmp_path: Path) -> None:
    """Of 12 rows in batches of 4, as an upper step reads too."""
    settings = {"hypergradient": "direct", "upper_fraction": 0.5, "logging_steps": 2}
    made = trainer(tmp_path, **settings, retrain="scratch")
    for _ in range(2):  # each training counts from 0
        output = made.train()
        records = logs(made) + logs(made.retrainer)
        assert [x["passes"] for x in records] == pytest.approx([3, 6, 9, 11, 13, 15])
        seconds = [record["seconds"] for record in records]
        assert seconds[0] > 0 and seconds == sorted(seconds)
        assert output.metrics["passes"] == pytest.approx(15)
        assert output.metrics["seconds"] >= seconds[-1]


class Boasts(Plain):
    """Its numbers have the names of the Trainer's own."""

    def loss(self, batch: Any) -> Any:
        return {"loss": super().loss(batch), "grad_norm": -1.0, "learning_rate": -1.0}


def test_the_trainer_s_own_numbers_keep_their_names(tmp_path: Path) -> None:
    made = streamed(tmp_path, upper=Boasts)
    made.train()
    for record in logs(made):
        assert record["upper_grad_norm"] >= 0 and record["upper_learning_rate"] > 0


class Fails(Weighted):
    """Its second loss is NaN; of every second evaluation it tells one number more."""

    calls = 0

    def loss(self, batch: Any) -> Any:
        self.calls += 1
        loss = super().loss(batch) * (math.nan if self.calls == 2 else 1.0)
        return {"loss": loss, "task": loss, **({"odd": 1.0} if self.calls % 2 else {})}


def test_a_skipped_step_is_in_no_mean_and_in_no_later_run(tmp_path: Path) -> None:
    settings = {"hypergradient": "direct", "non_finite": "skip", "logging_steps": 3}
    made = streamed(tmp_path, lower=Fails, upper=Penalised, **settings)
    made.train()
    assert [record["skipped"] for record in logs(made)] == [1, 1, 1]
    assert all(math.isfinite(record["lower_task"]) for record in logs(made))
    for record in logs(made)[1:]:  # also beside a number that only some of the steps have
        assert record["lower_task"] == pytest.approx(record["loss"])
    made.train()
    assert not any("skipped" in record for record in logs(made))


@pytest.mark.parametrize("number", [float, torch.tensor])
def test_each_level_s_rate_is_logged_in_whatever_order_the_groups_are(
    tmp_path: Path, number: Any
) -> None:
    model = peft_model()
    parts = split_parameters(model)
    above = {"params": list(parts.magnitudes.values()), "lr": number(0.5)}
    below = {"params": [*parts.directions.values(), *parts.rest.values()], "lr": number(0.25)}
    options = {"optimizers": (torch.optim.Adam([above, below]), None)}
    settings = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    made = trainer(tmp_path, model=model, options=options, **settings)
    made.train()
    record = logs(made, "upper_learning_rate")[-1]
    assert (record["learning_rate"], record["upper_learning_rate"]) == (0.25, 0.5)


def test_the_loss_of_a_lower_level_is_logged_without_its_prior(tmp_path: Path) -> None:
    micro, tau = 2, 50.0

    class Pulled(Weighted):
        def __init__(self, model: Any, weight: Any) -> None:
            super().__init__(model, weight, prior=tau)

    settings = {"max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": micro}
    settings |= {"per_device_train_batch_size": 8 // micro, "hypergradient": "direct"}
    run, _ = pair(tmp_path, lower=Pulled, upper=Penalised, **settings)
    start = [w.detach().clone() for w in run.lower.variables]
    points, priors = [], []

    def loss(batch: Any, task: Any = run.lower.loss) -> Any:
        if len(points) % micro == 0:
            moves = [w.detach() - w0 for w, w0 in zip(run.lower.variables, start, strict=True)]
            priors.append(tau / 2 * float(torch.cat([m.flatten() for m in moves]).square().mean()))
        points.append(task(batch))
        return points[-1]

    run.lower.loss = loss
    run.train()
    for number, record in enumerate(logs(run)):
        task = float(sum(points[number * micro : (number + 1) * micro])) / micro
        assert record["loss"] == pytest.approx(task, rel=1e-5)
        assert record["lower_prior"] == pytest.approx(priors[number], rel=1e-5, abs=1e-12)
    assert record["lower_prior"] > 0


def test_the_logged_ratio_is_of_the_window(tmp_path: Path) -> None:
    settings = {"max_steps": 12, "lower_steps": 2, "logging_steps": 6}
    run, watch = watched(tmp_path, peft_model(dropout=0.0).double(), **settings)
    run.train()
    names = list(split_parameters(run.model).magnitudes)
    upper = [torch.cat([g[n].flatten() for n in names]) for g in watch.gradients[1::2]]
    for record, window in zip(logs(run, "upper_snr"), torch.stack(upper).split(3), strict=True):
        mean = window.mean(0)
        noise = float((window - mean).square().sum()) / 2
        signal = max(0.0, float(mean @ mean) - noise / 3)
        assert record["upper_snr"] == pytest.approx((signal / noise) ** 0.5, rel=1e-9)


def test_the_gap_is_of_the_trainer_s_own_loss(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "max_steps": 6}
    run = trainer(tmp_path / "own", options={"eval_dataset": data(seed=9)}, **settings)
    run.train()
    above, found = None, []
    for record in run.state.log_history:
        above = record.get("upper_loss", above)
        if "eval_loss" in record:
            assert record["eval_upper_gap"] == pytest.approx(record["eval_loss"] - above)
            found.append(record)
    assert len(found) == 2
    assert "eval_upper_gap" not in run.evaluate()  # after training it would be of another time

    other, _ = pair(tmp_path / "other", evaluation=rows(8, 2), **settings)
    other.train()  # the levels' losses are not the model's
    assert not any("eval_upper_gap" in record for record in other.state.log_history)


@pytest.mark.parametrize(("residual", "shown"), [(0.05, False), (0.3, True)])
def test_a_printed_line_has_a_large_residual(residual: float, shown: bool) -> None:
    args, state = SimpleNamespace(details=False), SimpleNamespace(global_step=2, max_steps=4)
    line = line_of(args, state, {"loss": 1.0, "residual": residual})
    assert ("residual 0.3" in line) == shown and line.startswith("step 2/4  loss 1")


def test_the_first_note_of_an_estimator_is_logged_once(tmp_path: Path, caplog: Any) -> None:
    estimator = "neumann:terms=3,step_size=1e4"
    made = trainer(tmp_path, hypergradient=estimator, dropout=0.0, lower_steps=1, max_steps=3)
    made.train()
    notes = [x.getMessage() for x in caplog.records if "diverges" in x.getMessage()]
    assert notes == ["step 1: neumann: the series diverges at step_size 1e+04"]


class Detaching(Weighted):
    def loss(self, batch: Any) -> Any:
        return super().loss(batch) + sum((p.detach() * p).sum() for p in self.model.parameters())


def test_the_comparison_of_products_is_one_warning_and_counts_no_pass(tmp_path: Path) -> None:
    """A detached factor is in the differences of gradients, and in no exact product."""
    passes = []
    for kind in (Detaching, Weighted):
        made, _ = pair(tmp_path, lower=kind, max_steps=2, hypergradient="cg:steps=2,tolerance=0.0")
        warns = pytest.warns(HypergradientWarning, match="exact product differs")
        with warns if kind is Detaching else nullcontext():
            made.train()
        passes.append(made.passes.passes)
    # A step: one pass below; above F, f, and three products that count twice.
    assert passes == [passes[1]] * 2
