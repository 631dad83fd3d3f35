"""`upper_prior` of a Trainer is the level's own prior: same steps, logs, and end when resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hyperopt_peft import ProblemError, hypergradient
from hyperopt_peft.adapters import use_fast_dora
from hyperopt_peft.problems.bidora import Direction, Magnitude
from tests.support.class_weights import Plain, Weighted, pair
from tests.support.networks import differences
from tests.support.resume import end, interrupted, logs_of
from tests.support.trainers import peft_model
from tests.support.watch import batches_of, double, watched

TAU = 50.0


@pytest.mark.parametrize("method", ["direct", "darts:scheme=forward", "cg:steps=3,damping=1.0"])
@pytest.mark.filterwarnings("ignore::hyperopt_peft.errors.HypergradientWarning")
def test_the_step_is_that_of_a_level_with_the_prior(tmp_path: Path, method: str) -> None:
    settings = {"hypergradient": method, "upper_prior": TAU, "per_device_upper_batch_size": 4}
    run, watch = watched(tmp_path, double(peft_model(dropout=0.0)), **settings)
    lower_batches = batches_of(run, 6)
    run.train()
    fresh = double(peft_model(dropout=0.0))
    use_fast_dora(fresh, "full")
    lower, upper = Direction(fresh), Magnitude(fresh, prior=TAU)
    named = dict(fresh.named_parameters())
    logs = [record for record in run.state.log_history if "upper_loss" in record]
    for number, step in enumerate((1, 3, 5)):
        with torch.no_grad():
            for name, value in watch.points[step].items():
                named[name].copy_(value)
        above = run.upper_batches.batch(number)
        batches = {"upper_batch": above, "lower_batch": lower_batches[step]}
        expected = hypergradient(upper, lower, method, **batches)
        for name, part in zip(upper.names, expected, strict=True):
            torch.testing.assert_close(watch.gradients[step][name], part, rtol=1e-6, atol=1e-9)
        evaluation = upper.gradient(above, upper.variables)
        assert logs[number]["upper_prior"] == pytest.approx(evaluation.metrics["prior"], rel=1e-9)
        task = evaluation.loss - evaluation.metrics["prior"]
        assert logs[number]["upper_loss"] == pytest.approx(task, rel=1e-9)
    assert logs[0]["upper_prior"] == 0 < logs[1]["upper_prior"]


def with_prior(folder: Path, callbacks: Any = (), *, start: float = 1.0, **settings: Any) -> Any:
    """A trainer whose upper variable begins at (``start``, −1, 0)."""
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "logging_steps": 3}
    options |= {"upper_prior": TAU, "upper_max_grad_norm": 0.0, **settings}
    run, weight = pair(folder, callbacks=callbacks, **options)
    with torch.no_grad():
        for start_or_weight in (weight, *run.upper.prior.start):
            start_or_weight[0] = start
    return run


def test_a_resumed_run_pulls_to_the_first_run_s_initial_values(tmp_path: Path) -> None:
    """Not to the values of the checkpoint, nor to those of the program that goes on."""
    alone = with_prior(tmp_path / "alone")
    alone.train()
    interrupted(tmp_path / "broken", (5,), with_prior)
    resumed = with_prior(tmp_path / "broken", start=7.0)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(alone))
    assert not differences(logs_of(resumed), logs_of(alone))
    assert resumed.upper.prior.start[0].tolist() == [1.0, -1.0, 0.0]


def test_a_level_s_own_prior_is_resumed_too_and_is_not_given_twice(tmp_path: Path) -> None:
    class Pulled(Plain):
        def __init__(self, model: Any, weight: Any) -> None:
            super().__init__(model, weight, prior=TAU)

    settings = {"upper": Pulled, "upper_prior": None}
    alone = with_prior(tmp_path / "alone")
    alone.train()
    interrupted(tmp_path / "broken", (5,), with_prior, **settings)
    resumed = with_prior(tmp_path / "broken", start=7.0, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(alone))
    with pytest.raises(ProblemError, match="upper_prior"):
        pair(tmp_path, upper=Pulled, upper_prior=TAU)
    with pytest.raises(ProblemError, match="prior"):
        pair(tmp_path / "broken", max_steps=9)[0].train(resume_from_checkpoint=True)


@pytest.mark.parametrize("micro", [1, 2])
def test_the_loss_of_a_lower_level_is_logged_without_its_prior(tmp_path: Path, micro: int) -> None:
    class Pulled(Weighted):
        def __init__(self, model: Any, weight: Any) -> None:
            super().__init__(model, weight, prior=TAU)

    settings = {"max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": micro}
    settings |= {"per_device_train_batch_size": 8 // micro, "hypergradient": "direct"}
    run, _ = pair(tmp_path, lower=Pulled, **settings)
    start = [w.detach().clone() for w in run.lower.variables]
    points, priors = [], []

    def loss(batch: Any, task: Any = run.lower.loss) -> Any:
        if len(points) % micro == 0:
            moves = [w.detach() - w0 for w, w0 in zip(run.lower.variables, start, strict=True)]
            priors.append(TAU / 2 * float(torch.cat([m.flatten() for m in moves]).square().mean()))
        points.append(task(batch))
        return points[-1]

    run.lower.loss = loss
    run.train()
    logs = [record for record in run.state.log_history if "loss" in record]
    for number, record in enumerate(logs):
        task = float(sum(points[number * micro : (number + 1) * micro])) / micro
        assert record["loss"] == pytest.approx(task, rel=1e-5)
        assert record["lower_prior"] == pytest.approx(priors[number], rel=1e-5, abs=1e-12)
    assert logs[-1]["lower_prior"] > 0
