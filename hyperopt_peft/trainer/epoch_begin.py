"""Where an epoch began: what a run that goes on within it needs for the same order of the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from hyperopt_peft.engine import checkpoint
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import RandomState


@dataclass(frozen=True)
class EpochBegin:
    """The epoch's number, the steps before it, and the state that a sampler draws its order from.

    Of this process: each has a random state of its own, and a file in a checkpoint.
    """

    epoch: int
    step: int
    random_state: RandomState

    @classmethod
    def now(cls, epoch: int, step: int, devices: Iterable[torch.device]) -> EpochBegin:
        """The beginning of ``epoch``, after ``step`` steps."""
        return cls(epoch, step, RandomState.capture(devices))

    def write(self, folder: Path) -> None:
        """Write this process's file of the checkpoint in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        random = dict(self.random_state.states)
        torch.save({"epoch": self.epoch, "step": self.step, "random": random}, _file(folder))

    @classmethod
    def read(cls, folder: Path) -> EpochBegin:
        """What ``write`` wrote.

        Raises:
            ProblemError: there is no such file, or a damaged one.
        """
        state = checkpoint.read_state(_file(folder))
        return cls(state["epoch"], state["step"], RandomState(state["random"]))


def _file(folder: Path) -> Path:
    return folder / f"epoch_{distributed.rank()}.pt"
