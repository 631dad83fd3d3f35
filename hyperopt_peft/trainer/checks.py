"""What a `BilevelTrainer` refuses before it trains anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import ClassLabel, Dataset, Value
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers.trainer_utils import has_length

from hyperopt_peft.core.chain import is_chain
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.oracle import check_ownership
from hyperopt_peft.hypergradients.products import SHARDED
from hyperopt_peft.hypergradients.unrolled.direct import Direct
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.data import label_column
from hyperopt_peft.utils import distributed

if TYPE_CHECKING:
    from hyperopt_peft.trainer.trainer import BilevelTrainer

# They take the model in place of parameters, and some step in hooks of the backward pass.
SELF_WILLED = ("galore", "apollo", "lomo", "adalomo")


def check_arguments(
    args: Any, model: Any, options: Mapping[str, Any], *, trainer_loss: bool, own_loss: bool
) -> None:
    """Refuse what would train, and train something else than a bilevel program.

    Args:
        args: the settings.
        model: the trainer's model.
        options: what else `transformers.Trainer` is given.
        trainer_loss: whether the levels' losses are the Trainer's own.
        own_loss: whether the trainer's class has a ``compute_loss`` of its own.
    """
    if not isinstance(args, BilevelTrainingArguments):
        raise ProblemError(f"args must be BilevelTrainingArguments, got {type(args).__name__}")
    if not isinstance(model, nn.Module):
        raise ProblemError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrapped = isinstance(model, DataParallel | DistributedDataParallel)
    smoothing, optim = args.label_smoothing_factor, args.optim.value
    theirs = (
        "the levels have losses of their own; put it into these, or give the levels as functions "
        "of the trainer and let them read trainer.task_loss"
    )
    refused = {
        "fp16=True": (args.fp16, "the loss scale is part of the gradients; use bf16"),
        "deepspeed": (args.deepspeed, "DeepSpeed keeps gradients to itself; use DDP"),
        "fsdp": (
            args.fsdp and distributed.world_size() == 1,
            "one process has nothing to shard; start several, or use DDP",
        ),
        f"n_gpu={args.n_gpu}": (
            args.n_gpu > 1,
            "threads split a batch out of sight; start one process a device, with torchrun",
        ),
        f"a {type(model).__name__} model": (
            wrapped,
            "levels own the parameters of the model inside; give that, and use torchrun",
        ),
        "auto_find_batch_size=True": (
            args.auto_find_batch_size,
            "the Trainer starts again within a step; give per_device_train_batch_size",
        ),
        f"optim={optim!r}": (
            optim.startswith(SELF_WILLED),
            "the optimizer chooses its own parameters; use one that takes groups, as adamw_torch",
        ),
        "torch_compile=True": (
            args.torch_compile,
            "the levels call the model itself, and not what it is wrapped in; use model.compile()",
        ),
        "model_init": (
            options.get("model_init"),
            "levels own the tensors of one model; make the model first",
        ),
        "compute_loss_func": (not trainer_loss and options.get("compute_loss_func"), theirs),
        "compute_loss": (not trainer_loss and own_loss, theirs),
        f"label_smoothing_factor={smoothing}": (not trainer_loss and smoothing, theirs),
    }
    for name, (given, reason) in refused.items():
        if given:
            raise ProblemError(f"{name}: bilevel training does not go with this, since {reason}")
    optimizers = options.get("optimizers", (None, None))
    if not isinstance(optimizers, Sequence) or len(optimizers) != 2:
        raise ProblemError(f"optimizers must be (optimizer, scheduler), got {optimizers!r}")


def check_levels(levels: Sequence[Problem]) -> None:
    """Refuse levels that share a tensor, stand on others, or have what the trainer has."""
    for level in levels:
        if is_chain(level):
            raise ProblemError(
                f"{level.name}: the level has levels below, and a trainer has two; use the Engine"
            )
    check_ownership(*levels)
    for level in levels:
        if level.batches is not None or level.optimizer is not None or level.scheduler is not None:
            raise ProblemError(
                f"{level.name}: give data and optimizer to the trainer, not to the level"
            )
        if level.max_grad_norm is not None:
            raise ProblemError(
                f"{level.name}: give the limit of the gradient's norm as the argument "
                "max_grad_norm or upper_max_grad_norm, not to the level"
            )
        if level.optimizer_options():
            raise ProblemError(
                f"{level.name} has optimizer_options, but the Trainer's own arguments and schedule "
                "set its optimizer's; learn these with the Engine"
            )


def check_batches(args: BilevelTrainingArguments, data: Any) -> None:
    """Refuse a training set that ``dataloader_drop_last`` leaves without a batch."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and has_length(data) and len(data) < batch:
        raise ProblemError(
            f"dataloader_drop_last: True leaves no batch of {batch} of the {len(data)} examples of "
            "train_dataset; lower per_device_train_batch_size"
        )


def check_labels(model: Any, data: Any, options: Mapping[str, Any]) -> None:
    """Refuse labels that a classifier has no output for, an index error deep in its loss.

    Only where the labels are sure to reach that loss as they are.
    """
    config = getattr(model, "config", None)
    classes = getattr(config, "num_labels", 1)
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    single = getattr(config, "problem_type", None) in (None, "single_label_classification")
    collator = options.get("data_collator")
    changed = collator is not None and not collator.__module__.startswith("transformers.")
    if changed or options.get("compute_loss_func") or not isinstance(data, Dataset):
        return
    column = label_column(data)
    if not (kind.endswith("Classification") and single and classes > 1 and column):
        return
    feature = data.features[column]
    dtype = feature.dtype if isinstance(feature, ClassLabel | Value) else ""
    if "string" in dtype:
        raise ProblemError(
            f"{column}: the labels are text; number them with class_encode_column({column!r})"
        )
    if "int" not in dtype:
        return
    largest = max(filter(None, data.unique(column)), default=0)
    if largest >= classes:
        raise ProblemError(
            f"{column}: the data have class {largest}, but the model's num_labels is {classes} "
            f"(classes 0 to {classes - 1}); load the model with num_labels={largest + 1}"
        )


def check_accelerator(trainer: BilevelTrainer) -> None:
    """Raise ProblemError where ``trainer`` would train something else than its levels.

    DDP is as good as one process. FSDP2 is for estimators with first-order products, in float32.
    """
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled:
        raise ProblemError("deepspeed: DeepSpeed keeps gradients to itself; use DDP or FSDP2")
    if accelerator.mixed_precision == "fp16":
        raise ProblemError("fp16: the loss scale is part of the gradients; use bf16")
    if distributed.world_size() != trainer.args.world_size:
        raise ProblemError(
            f"world_size: there are {distributed.world_size()} processes, but the Trainer counts "
            f"{trainer.args.world_size}, so that each would train alone on all data and write to "
            "one folder; on CPUs set use_cpu=True"
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer)
    elif trainer.args.fsdp:
        raise ProblemError("fsdp: accelerate has FSDP for GPUs only; use DDP on CPUs")


def _check_fsdp(trainer: BilevelTrainer) -> None:
    plugin, precision = trainer.accelerator.state.fsdp_plugin, trainer.accelerator.mixed_precision
    if plugin.fsdp_version != 2:
        raise ProblemError("fsdp_version: FSDP1 hides the parameters that a level owns; set 2")
    if "FULL" not in str(plugin.state_dict_type):
        raise ProblemError(
            "fsdp_state_dict_type: a sharded state dict is a pickle, and loading one could run "
            "code; set FULL_STATE_DICT"
        )
    if trainer.upper is not None and trainer.estimator.requirements.second_derivatives:
        raise ProblemError(f"{trainer.estimator.name}: {SHARDED}")
    differences = trainer.upper is not None and not isinstance(trainer.estimator, Direct)
    if differences and precision != "no":
        raise ProblemError(
            f"mixed_precision: {precision} does not go with FSDP2, since a difference of gradients "
            "needs parameters that are gathered in float32; turn it off"
        )
    of_model = {id(parameter) for parameter in trainer.model.parameters()}
    for level in trainer.levels:
        for name, variable in zip(level.names, level.variables, strict=True):
            if id(variable) not in of_model:
                raise ProblemError(
                    f"{level.name}: {name} is no parameter of the model, and FSDP2 shards "
                    "nothing else; make it one"
                )


def shifts_labels(model: Any) -> bool:
    """Whether the loss of ``model`` compares a token with the label of the next one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = not getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return decoder and getattr(base, "loss_type", None) == "ForCausalLM"
