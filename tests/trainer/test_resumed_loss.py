"""What `train` returns after a resumption is of the steps that it took."""

import pytest

from .models import trainer


def test_train_loss_of_a_resumed_run_is_the_mean_over_its_own_steps(tmp_path):
    each = trainer(tmp_path / "each", max_steps=8)
    each.train()
    losses = [record["loss"] for record in each.state.log_history if "loss" in record]

    # The checkpoint of step 3 holds three losses that were not yet logged.
    settings = {"max_steps": 8, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path / "whole", **settings).train()
    resumed = trainer(tmp_path / "whole", **settings)
    result = resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert result.training_loss == pytest.approx(sum(losses[3:]) / 5, rel=1e-5)
    assert resumed.state.log_history[0]["loss"] == pytest.approx(sum(losses[:4]) / 4, rel=1e-5)
