"""What the Trainer does with a checkpoint, it does with one that is whole."""

from pathlib import Path

import pytest
from transformers import Trainer, TrainerCallback

from hyperopt_peft.engine.checkpoint import last_whole, unseal
from tests.support.networks import differences
from tests.support.resume import end, saving


def test_a_checkpoint_is_pushed_when_it_is_whole(tmp_path, monkeypatch):
    pushed = []

    def push(self, folder):
        unseal(Path(folder))
        pushed.append(Path(folder).name)

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    made = saving(tmp_path)
    made.args.push_to_hub = True  # given at construction, it asks the Hub for a repository
    made.train()
    assert pushed == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]


@pytest.mark.parametrize("retrain", ["none", "warm"])
def test_a_run_goes_on_from_the_checkpoint_that_a_signal_asked_for(tmp_path, retrain):
    """The Trainer's mark of a folder that it is writing is removed when that is done.

    And a search that has not ended is not followed by a retraining.
    """

    class Ask(TrainerCallback):
        """As SIGTERM does, three seconds later."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4 and not args.output_dir.endswith("retrain"):
                callbacks = made.callback_handler.callbacks
                (found,) = [c for c in callbacks if type(c).__name__ == "JITCheckpointCallback"]
                found.jit_manager.is_checkpoint_requested = True

    settings = {"enable_jit_checkpoint": True, "save_steps": 100, "retrain": retrain}
    whole = saving(tmp_path / "whole", **settings)
    whole.train()
    made = saving(tmp_path / "broken", [Ask()], **settings)
    made.train()
    assert made.state.global_step < 9 and made.retrainer is None
    assert last_whole(tmp_path / "broken").name == "checkpoint-4"
    resumed = saving(tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(whole))
