"""`upper_prior` of a Trainer is the level's own prior: same steps, logs, and end when resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hyperopt_peft import ProblemError
from tests.support.class_weights import Penalised, Plain, Weighted, pair
from tests.support.networks import differences
from tests.support.resume import end, interrupted, logs_of

TAU = 50.0


def with_prior(folder: Path, callbacks: Any = (), *, start: float = 1.0, **settings: Any) -> Any:
    """A trainer whose upper variable begins at (``start``, −1, 0)."""
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "logging_steps": 3}
    options |= {"upper_prior": TAU, "upper_max_grad_norm": 0.0, **settings}
    run, weight = pair(folder, callbacks=callbacks, **options)
    with torch.no_grad():
        for start_or_weight in (weight, *run.upper.prior.start):
            start_or_weight[0] = start
    return run


class Pulled(Plain):
    """The upper level with a prior of its own."""

    def __init__(self, model: Any, weight: Any) -> None:
        super().__init__(model, weight, prior=TAU)


@pytest.mark.parametrize("settings", [{}, {"upper": Pulled, "upper_prior": None}])
def test_a_resumed_run_pulls_to_the_first_run_s_initial_values(
    tmp_path: Path, settings: Any
) -> None:
    """Not to the values of the checkpoint, nor to those of the program that goes on."""
    alone = with_prior(tmp_path / "alone")
    alone.train()
    interrupted(tmp_path / "broken", (5,), with_prior, **settings)
    resumed = with_prior(tmp_path / "broken", start=7.0, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(alone))
    assert not differences(logs_of(resumed), logs_of(alone))
    assert resumed.upper.prior.start[0].tolist() == [1.0, -1.0, 0.0]
    without, _ = pair(tmp_path / "broken", max_steps=9, upper_max_grad_norm=0.0)
    with pytest.raises(ProblemError, match=r"^[\w ]*prior"):
        without.train(resume_from_checkpoint=True)


def test_a_prior_is_not_given_twice(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="upper_prior"):
        pair(tmp_path, upper=Pulled, upper_prior=TAU)


@pytest.mark.parametrize("micro", [1, 2])
def test_the_loss_of_a_lower_level_is_logged_without_its_prior(tmp_path: Path, micro: int) -> None:
    class Pulled(Weighted):
        def __init__(self, model: Any, weight: Any) -> None:
            super().__init__(model, weight, prior=TAU)

    settings = {"max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": micro}
    settings |= {"per_device_train_batch_size": 8 // micro, "hypergradient": "direct"}
    run, _ = pair(tmp_path, lower=Pulled, upper=Penalised, **settings)
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
