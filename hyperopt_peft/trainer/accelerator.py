"""What a configuration of ``accelerate launch`` may choose, and bilevel training can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.products import SHARDED
from hyperopt_peft.hypergradients.unrolled.direct import Direct
from hyperopt_peft.utils import distributed

if TYPE_CHECKING:
    from hyperopt_peft.trainer.sealed_trainer import SealedTrainer


def check_accelerator(trainer: SealedTrainer) -> None:
    """Raise ProblemError where ``trainer`` would train something else than its levels.

    DDP is as good as one process. FSDP2 is for estimators with first-order products, in float32.
    """
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled:
        raise ProblemError("DeepSpeed keeps gradients to itself; use DDP or FSDP2")
    if accelerator.mixed_precision == "fp16":
        raise ProblemError("fp16's loss scale is part of the gradients; use bf16")
    if distributed.count() != trainer.args.world_size:
        raise ProblemError(
            f"there are {distributed.count()} processes, but the Trainer counts "
            f"{trainer.args.world_size}, so that each would train alone on all data and write to "
            "one folder; on CPUs set use_cpu=True"
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer)
    elif trainer.args.fsdp:
        raise ProblemError("accelerate has FSDP for GPUs only; use DDP on CPUs")


def _check_fsdp(trainer: SealedTrainer) -> None:
    plugin, precision = trainer.accelerator.state.fsdp_plugin, trainer.accelerator.mixed_precision
    if plugin.fsdp_version != 2:
        raise ProblemError("FSDP1 hides the parameters that a level owns; set fsdp_version: 2")
    if "FULL" not in str(plugin.state_dict_type):
        raise ProblemError(
            "a sharded state dict is a pickle, and loading one could run code; set "
            "fsdp_state_dict_type: FULL_STATE_DICT"
        )
    exact = trainer.estimator.requirements.second_derivatives
    if trainer.upper is not None and exact:
        raise ProblemError(f"{trainer.estimator.name}: {SHARDED}")
    direct = isinstance(trainer.estimator, Direct)
    if trainer.upper is not None and not direct and precision != "no":
        raise ProblemError(
            f"{precision} does not go with FSDP2: a difference of gradients needs parameters "
            "that are gathered in float32; turn it off"
        )
    of_model = {id(parameter) for parameter in trainer.model.parameters()}
    for level in trainer._levels:
        for name, variable in zip(level.names, level.variables, strict=True):
            if id(variable) not in of_model:
                raise ProblemError(
                    f"{level.name}: {name} is no parameter of the model, and FSDP2 shards "
                    "nothing else; make it one"
                )
