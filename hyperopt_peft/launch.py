"""What a launcher may choose without the training arguments' knowledge."""

from __future__ import annotations

from transformers import Trainer

from hyperopt_peft import processes
from hyperopt_peft.errors import ProblemError


def check_launch(trainer: Trainer) -> None:
    """Refuse what ``accelerate launch`` or the environment set up, and would train wrongly.

    Raises:
        ProblemError: fp16, DeepSpeed or FSDP, or processes that the Trainer does not know of.
    """
    refused = {
        "mixed_precision: fp16": trainer.accelerator.mixed_precision == "fp16",
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
    }
    for name, given in refused.items():
        if given:
            raise ProblemError(
                f"{name}, chosen by the launcher, does not go with bilevel training; use DDP, and "
                "bf16 for half precision"
            )
    if processes.count() != trainer.args.world_size:
        raise ProblemError(
            f"there are {processes.count()} processes, but the Trainer counts "
            f"{trainer.args.world_size}, so that each would train alone on all data and write to "
            "one folder; on CPUs set use_cpu=True"
        )
