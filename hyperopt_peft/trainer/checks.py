"""What a `BilevelTrainer` refuses before it trains anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Value
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from transformers.trainer_utils import has_length

from hyperopt_peft.core.chain import is_chain
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.oracle import check_ownership
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.data import label_column
from hyperopt_peft.utils import distributed

# They take the model in place of parameters, and some step in hooks of the backward pass.
SELF_WILLED = ("galore", "apollo", "lomo", "adalomo")


def check_arguments(
    args: Any, model: Any, options: Mapping[str, Any], *, trainer_loss: bool
) -> None:
    """Refuse what would train, and train something else than a bilevel program.

    Args:
        args: the settings.
        model: the trainer's model.
        options: what else `transformers.Trainer` is given.
        trainer_loss: whether the levels' losses are the Trainer's own.
    """
    if not isinstance(args, BilevelTrainingArguments):
        raise ProblemError(f"args must be BilevelTrainingArguments, got {type(args).__name__}")
    if not isinstance(model, nn.Module):
        raise ProblemError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrapped = isinstance(model, DataParallel | DistributedDataParallel)
    smoothing, optim = args.label_smoothing_factor, args.optim.value
    own_loss = "the levels have losses of their own; put it into these"
    refused = {
        "fp16=True": (args.fp16, "its loss scale is part of the gradients; use bf16"),
        "deepspeed": (args.deepspeed, "it keeps gradients to itself; use DDP"),
        "fsdp": (
            args.fsdp and distributed.count() == 1,
            "one process has nothing to shard; start several, or use DDP",
        ),
        f"n_gpu={args.n_gpu}": (args.n_gpu > 1, "start one process a device, with torchrun"),
        f"a {type(model).__name__} model": (wrapped, "give the model inside, and use torchrun"),
        "auto_find_batch_size=True": (
            args.auto_find_batch_size,
            "it starts again in the middle of a step; give per_device_train_batch_size",
        ),
        f"optim={optim!r}": (
            optim.startswith(SELF_WILLED),
            "it chooses its own parameters; choose one that takes groups, such as adamw_torch",
        ),
        "torch_compile=True": (
            args.torch_compile,
            "the levels call the model itself, and not what it is wrapped in; use model.compile()",
        ),
        "model_init": (options.get("model_init"), "levels own the tensors of one model"),
        "compute_loss_func": (not trainer_loss and options.get("compute_loss_func"), own_loss),
        f"label_smoothing_factor={smoothing}": (not trainer_loss and smoothing, own_loss),
    }
    for name, (given, reason) in refused.items():
        if given:
            raise ProblemError(f"{name} does not go with bilevel training: {reason}")
    optimizers = options.get("optimizers", (None, None))
    if not isinstance(optimizers, Sequence) or len(optimizers) != 2:
        raise ProblemError(f"optimizers must be (optimizer, scheduler), got {optimizers!r}")


def check_levels(levels: Sequence[Problem]) -> None:
    """Refuse levels that share a tensor, stand on others, or have what the trainer has."""
    for level in levels:
        if is_chain(level):
            raise ProblemError(
                f"{level.name} stands on other levels, and a trainer has two; train it by Engine"
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


def check_optimizer(optimizer: Any, scheduler: Any, levels: Sequence[Problem]) -> None:
    """Refuse a user's optimizer unless it holds the levels' variables, each level's apart."""
    if optimizer is None:
        if scheduler is not None:
            raise ProblemError("there is a scheduler without an optimizer; give both or neither")
        return
    if not isinstance(optimizer, Optimizer):
        raise ProblemError(f"the optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ProblemError("the scheduler drives another optimizer than the one it is given with")
    names = {id(v): n for level in levels for n, v in zip(level.names, level.variables)}
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [tuple(p.shape) for p in held if id(p) not in names]
    missing = [name for key, name in names.items() if not any(key in group for group in groups)]
    if missing or foreign:
        raise ProblemError(
            "the optimizer must hold exactly the variables of both levels; it lacks "
            f"{missing or 'none'} and also holds tensors of shape {foreign or 'none'}"
        )
    owned = [{id(v) for v in level.variables} for level in levels]
    if any(sum(bool(group & own) for own in owned) > 1 for group in groups):
        raise ProblemError(
            "a group of the optimizer holds variables of both levels, which would share a "
            "learning rate; give each level groups of its own"
        )


def check_batches(args: BilevelTrainingArguments, data: Any) -> None:
    """Refuse a training set that ``dataloader_drop_last`` leaves without a batch."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and has_length(data) and len(data) < batch:
        raise ProblemError(
            f"dataloader_drop_last=True leaves no batch of {batch} of the {len(data)} examples of "
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
            f"the labels in {column!r} are text; number them with class_encode_column({column!r})"
        )
    if "int" not in dtype:
        return
    largest = max(filter(None, data.unique(column)), default=0)
    if largest >= classes:
        raise ProblemError(
            f"the data have class {largest} in {column!r}, but the model's num_labels is {classes} "
            f"(classes 0 to {classes - 1}); load the model with num_labels={largest + 1}"
        )
