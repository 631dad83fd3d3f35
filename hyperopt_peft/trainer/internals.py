"""Private names of `transformers`, each with a test in tests/contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

if TYPE_CHECKING:
    from transformers import Trainer

#: Files of a checkpoint without which the Trainer does not resume. The optimizer's has a name of
#: its own under FSDP.
NEEDED = (SCHEDULER_NAME, TRAINER_STATE_NAME)


def save_checkpoint(trainer: Trainer) -> None:
    """Write a checkpoint now; the public interface writes one only after a complete step."""
    trainer._save_checkpoint(trainer.model, None)
