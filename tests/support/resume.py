"""A Trainer's run that is stopped, resumed and compared with one left alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback, TrainerCallback

from hyperopt_peft.engine.checkpoint import last_whole
from hyperopt_peft.problems import BiDoRATrainer
from tests.support.networks import differences
from tests.support.trainers import trainer

TIMES = ("_runtime", "_per_second")


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
    folder: Path, callbacks: Sequence[TrainerCallback] = (), *, options: Any = None, **settings: Any
) -> BiDoRATrainer:
    """A trainer that logs every second step and saves every third."""
    common = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    options = {"callbacks": list(callbacks), **(options or {})}
    made = trainer(folder, options=options, **{**common, **settings})
    made.remove_callback(PrinterCallback)
    return made


def interrupted(
    folder: Path, stop: tuple[int, str] | tuple[int], make: Any = saving, **settings: Any
) -> None:
    """Train until ``stop``, from the last whole checkpoint where there is one."""
    made = make(folder, [StopAt(*stop)], **settings)
    with pytest.raises(Stop):
        made.train(resume_from_checkpoint=last_whole(folder) is not None)


def end(made: Any) -> dict[str, Any]:
    """All that should be the same."""
    last = getattr(made, "retrainer", None) or made
    logs = [
        {key: value for key, value in record.items() if not key.endswith(TIMES)}
        for record in last.state.log_history
    ]
    values = {
        f"{level.name}.{name}": v.detach().clone()
        for level in made._levels
        for name, v in zip(level.names, level.variables)
    }
    return {
        "values": {**values, **{n: p.detach().clone() for n, p in made.model.named_parameters()}},
        "optimizer": last.optimizer.state_dict(),
        "schedule": last.lr_scheduler.state_dict(),
        "logs": logs,
        "skipped": last.skipped,
        "step": last.state.global_step,
        "tokens and operations": [last.state.num_input_tokens_seen, last.state.total_flos],
    }


def require_same_end(
    folder: Path, *stops: Any, make: Any = saving, resume: bool = True, **settings: Any
) -> tuple[Any, ...]:
    whole = make(folder / "whole", **settings)
    output = whole.train()
    expected = end(whole)
    for stop in stops:
        interrupted(folder / "broken", stop, make, **settings)
    resumed = make(folder / "broken", **settings)
    found = resumed.train(resume_from_checkpoint=resume)
    assert not differences(end(resumed), expected)
    assert found.training_loss == output.training_loss
    return whole, resumed
