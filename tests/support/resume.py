"""A Trainer's run that is stopped, resumed and compared with one left alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hyperopt_peft.engine.checkpoint import last_valid
from tests.support.networks import differences
from tests.support.trainers import trainer

TIMES = ("_runtime", "_per_second", "seconds", "train_loss")


class Stop(Exception):
    pass


class StopAt(TrainerCallback):
    """Raises in a step, before what it logs and saves, of the search or the retraining."""

    def __init__(self, step: int, phase: str = "search") -> None:
        self.step, self.phase = step, phase

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phase = "retrain" if args.output_dir.endswith("retrain") else "search"
        if (state.global_step, phase) == (self.step, self.phase):
            raise Stop


def saving(
    folder: Path,
    callbacks: Sequence[Any] = (),
    *,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer that logs and saves every third step."""
    common = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "logging_steps": 3}
    options = {"callbacks": list(callbacks), **(options or {})}
    return trainer(folder, options=options, **{**common, **settings})


def interrupted(
    folder: Path, stop: Sequence[Any], make: Callable[..., Any] = saving, **settings: Any
) -> None:
    """Train until ``stop``, from the last complete checkpoint where there is one."""
    made = make(folder, [StopAt(*stop)], **settings)
    with pytest.raises(Stop):
        made.train(resume_from_checkpoint=last_valid(folder) is not None)


def end(made: Any) -> dict[str, Any]:
    last = getattr(made, "retrainer", None) or made
    parameters = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    return {
        "values": {n: v.detach().clone() for n, v in made.named_tensors()} | parameters,
        "optimizer": last.optimizer.state_dict(),
        "schedule": last.lr_scheduler.state_dict(),
        "skipped": last.skipped,
        "step": last.state.global_step,
        "tokens and operations": [last.state.num_input_tokens_seen, last.state.total_flos],
    }


def logs_of(made: Any) -> list[dict[str, Any]]:
    """The logs of the last phase without times, and without the loss since the run was resumed."""
    last = getattr(made, "retrainer", None) or made
    return [
        {key: value for key, value in record.items() if not key.endswith(TIMES)}
        for record in last.state.log_history
    ]


def require_same_end(
    folder: Path,
    *stops: Sequence[Any],
    make: Callable[..., Any] = saving,
    **settings: Any,
) -> tuple[Any, Any]:
    """Both ended runs, whose logs are alike too: each is of steps on one side of a checkpoint."""
    alone = make(folder / "alone", **settings)
    alone.train()
    for stop in stops:
        interrupted(folder / "broken", stop, make, **settings)
    resumed = make(folder / "broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(end(resumed), end(alone))
    assert not differences(logs_of(resumed), logs_of(alone))
    return alone, resumed
