"""Checkpoints: what is on disk is what the user gave; a signal asks for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hyperopt_peft.engine.checkpoint import last_valid
from tests.support.networks import differences
from tests.support.resume import end, saving


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
