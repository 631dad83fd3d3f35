"""`f2sa` and `penalty` under the Trainer: what the lower steps descend, and that they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hyperopt_peft import hypergradient
from hyperopt_peft.hypergradients.penalty.penalty import GAMMA
from tests.support.trainers import peft_model
from tests.support.watch import batches_of, double, replayed, watched


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
@pytest.mark.parametrize("micro", [1, 2])
def test_lower_steps_descend_f_and_a_share_of_the_upper_loss(tmp_path: Path, micro: Any) -> None:
    """Each on an upper batch of its own, a function of the step; and u moves at the same point."""
    method = "penalty:inner_steps=3"
    settings = {"hypergradient": method, "gradient_accumulation_steps": micro, "rows": 30}
    settings["per_device_upper_batch_size"] = 4
    run, watch = watched(tmp_path, double(peft_model(dropout=0.0)), **settings)
    lower_batches = batches_of(run, 6 * micro)
    run.train()
    lower, upper, move = replayed(watch)
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    for step in range(6):
        move(step)
        batches = lower_batches[step * micro : (step + 1) * micro]
        parts = [lower.gradient(batch, lower.variables) for batch in batches]
        above = upper.gradient(run.upper_batches.batch(step + step // 2), lower.variables)
        assert losses[step] == pytest.approx(sum(part.loss for part in parts) / micro, abs=1e-4)
        for k, name in enumerate(lower.names):
            expected = sum(part.gradient[k] for part in parts) / micro
            expected = expected + above.gradient[k] / GAMMA
            torch.testing.assert_close(watch.gradients[step][name], expected, rtol=1e-9, atol=1e-12)
        if step % 2 == 1 and micro == 1:
            number = step + 1 + (step + 1) // 2 - 1
            given = {"upper_batch": run.upper_batches.batch(number), "lower_batch": batches[0]}
            expected = hypergradient(upper, lower, method, **given)
            for name, part in zip(upper.names, expected, strict=True):
                found = watch.gradients[step][name]
                assert (found - part).norm() <= 1e-3 * part.norm() + 1e-6
