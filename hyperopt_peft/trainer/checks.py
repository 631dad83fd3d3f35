"""The settings, levels and labels that a `BilevelTrainer` refuses before training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from datasets import Dataset
from packaging.version import Version
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from hyperopt_peft.adapters.layers import require_plain
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.labels import TOLERANCE
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import Estimator
from hyperopt_peft.hypergradients.estimate import check_ownership
from hyperopt_peft.hypergradients.products import SHARDED
from hyperopt_peft.trainer.data import collating, label_column
from hyperopt_peft.trainer.upper_batches import loader_of
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.models import (
    base_model,
    evaluating,
    require_no_rounding,
    rounds_activations,
)
from hyperopt_peft.utils.precision import require_float32
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.validation import require_writable

logger = logging.get_logger(__name__)
#: The oldest transformers whose loading of a sharded adapter was seen to work.
FSDP2_SINCE = Version("5.10")
#: An adapter hardly learns in a phase of a smaller rate × steps, twice the way that Adam takes a
#: weight with linear decay. The held-out score of DoRA on five tasks was .46 at .03, .60 at .1 and
#: .68 to .70 from .3 on, whether by more steps or by a higher rate.
LEARNS = 0.1


def warn_of_short_phase(phase: str, args: Any, rows: int) -> None:
    """Log a warning where ``phase``, on ``rows`` rows, has too few steps to learn by Adam.

    A run without logs, such as one of many rates that are compared, has no warning.
    """
    if args.logging_strategy == "no":
        return
    steps = args.steps_of(rows) if rows else args.max_steps
    if 0 < args.learning_rate * steps < LEARNS and "adam" in args.optim:
        logger.warning_once(
            f"{phase}: {steps} steps at a learning rate of {args.learning_rate:g} hardly train an "
            f"adapter; give it {math.ceil(LEARNS / args.learning_rate)} steps or a higher rate"
        )


def check_class(args: Any, kind: Any) -> None:
    """Raise ProblemError unless ``args`` are of ``kind``, or of both bases that it combines."""
    bases = vars(kind).get("made_by", (None, (kind,)))[1]
    if not all(isinstance(args, base) for base in bases):
        raise ProblemError(
            f"args must be {kind.__name__}, got {type(args).__name__}; make them by the Arguments "
            "of the trainer's class"
        )


def check_arguments(
    args: Any, options: Mapping[str, Any], *, trainer_loss: bool, custom_loss: bool
) -> None:
    """Raise ProblemError for settings that would not train the bilevel program.

    ``trainer_loss`` says whether the lower level uses the Trainer's own loss, ``custom_loss``
    whether a class overrides it.
    """
    if args.should_save and args.save_strategy != "no":
        require_writable(Path(args.output_dir))
    of_levels = (
        "the levels have losses of their own; change these, or give the levels as functions of the "
        "trainer that read trainer.task_loss"
    )
    refused = {
        "fsdp": (
            args.fsdp and distributed.world_size() == 1,
            "one process has nothing to shard; start several, or use DDP",
        ),
        f"n_gpu={args.n_gpu}": (
            args.n_gpu > 1,
            "its threads split the batch; start one process a device, with torchrun",
        ),
        "auto_find_batch_size=True": (
            args.auto_find_batch_size,
            "the Trainer starts again within a step; give per_device_train_batch_size",
        ),
        "torch_compile=True": (
            args.torch_compile,
            "the levels call the model and not its compiled wrapper; use model.compile()",
        ),
        "torch_empty_cache_steps": (
            args.torch_empty_cache_steps,
            "a step has many passes; empty the cache in a callback",
        ),
        "activation_offloading=True": (
            getattr(args, "activation_offloading", False),
            "the estimators' passes would not offload; use gradient_checkpointing",
        ),
        "deepspeed": (
            args.deepspeed or getattr(args, "deepspeed_plugin", None),
            "DeepSpeed does not expose gradients; use DDP or FSDP2",
        ),
        "model_init": (
            options.get("model_init"),
            "levels own the tensors of one model; make the model first",
        ),
        "compute_loss_func": (not trainer_loss and options.get("compute_loss_func"), of_levels),
        "compute_loss": (not trainer_loss and custom_loss, of_levels),
        "label_smoothing_factor": (not trainer_loss and args.label_smoothing_factor, of_levels),
    }
    for name, (used, reason) in refused.items():
        if used:
            raise ProblemError(f"{name}: not possible in bilevel training, since {reason}")


def check_levels(levels: Sequence[Problem]) -> None:
    """Raise ProblemError for a chain, a shared tensor, or attributes that the trainer has."""
    for level in levels:
        if isinstance(level, Problem):  # else refused below
            level.require_single("a trainer has two levels; use the Engine")
    check_ownership(*levels)
    for level in levels:
        attributes = {
            "data": level.batches,
            "optimizer": level.optimizer,
            "scheduler": level.scheduler,
            "max_grad_norm": level.max_grad_norm,
            "optimizer_options": level.optimizer_options() or None,
        }
        if names := [name for name, value in attributes.items() if value is not None]:
            raise ProblemError(
                f"{level.name}: the level has {names[0]}, which the arguments of the trainer set; "
                "leave it out, or use the Engine"
            )


def check_labels(model: Any, data: Any, options: Mapping[str, Any]) -> None:
    """Raise ProblemError for labels without an output of the classifier ``model``.

    A collator or a loss function of the user's may change the labels; then nothing is checked.
    """
    config = getattr(model, "config", None)
    classes = getattr(config, "num_labels", 1)
    kind = type(base_model(model)).__name__
    single = getattr(config, "problem_type", None) in (None, "single_label_classification")
    collator = options.get("data_collator")
    changed = collator is not None and not collator.__module__.startswith("transformers.")
    if changed or options.get("compute_loss_func") or not isinstance(data, Dataset):
        return
    column = label_column(data)
    if not (kind.endswith("Classification") and single and classes > 1 and column):
        return
    dtype = getattr(data.features[column], "dtype", "")
    if "string" in dtype:
        raise ProblemError(
            f"{column}: the labels are text; number them with class_encode_column({column!r})"
        )
    # `unique` of a selection would show a bar.
    labels = data.with_format(None)[column][:] if "int" in dtype else []
    largest = max(filter(None, labels), default=0)
    if largest >= classes:
        raise ProblemError(
            f"{column}: the data have class {largest}, but the model's num_labels is {classes} "
            f"(classes 0 to {classes - 1}); load the model with num_labels={largest + 1}"
        )


def read_rows(trainer: Any) -> Any:
    """The training rows without columns that neither the model nor a level reads."""
    rows, name = trainer.train_dataset, "train_dataset"
    if not isinstance(rows, Dataset):
        return rows
    return rows.select_columns(loader_of(trainer, rows, name).dataset.column_names)


@torch.no_grad()
def check_weighted(trainer: Any, level: Problem) -> None:
    """Raise ProblemError if ``level`` weights rows whose mean loss is not the trainer's.

    The first batch decides. Under FSDP2 nothing is checked: parameters may not be here yet.
    """
    changed = trainer.compute_loss_func or trainer.label_smoother or trainer.has_own_loss()
    if not isinstance(level, WeightedRows) or not changed or trainer.is_fsdp_enabled:
        return
    rows = read_rows(trainer)
    with collating("train_dataset"), replay(RandomState.capture()):
        count = min(trainer.args.per_device_train_batch_size, len(rows))
        batch = trainer.data_collator([rows[row] for row in range(count)])
        batch = send_to_device(batch, trainer.args.device)
        with evaluating(trainer.model), trainer._measuring():
            mean, loss = float(level.losses(batch).sum()), float(trainer.task_loss(batch))
    if abs(loss - mean) > TOLERANCE * abs(mean):
        raise ProblemError(
            f"{type(trainer).__name__}: the loss of the first batch is {loss:.4g}, and the mean "
            f"over its labels {mean:.4g}, so that a row has no loss of its own; use a trainer, or "
            "settings, whose loss is that mean"
        )


def check_layers(model: nn.Module, levels: Sequence[Problem], estimator: Estimator) -> None:
    """Raise ProblemError for layers that round activations, or lack float32, as products need it.

    A product raises an error too, after the first lower steps.
    """
    needs = estimator.requirements
    if len(levels) == 1:
        return
    if needs.differences:
        require_no_rounding(model.modules())
    if needs.differences or needs.second_derivatives:
        require_float32(model)
    for name, layer in model.named_modules() if needs.second_derivatives else ():
        for adapter in getattr(layer, "lora_magnitude_vector", ()):
            try:
                require_plain(layer, adapter, name)
            except ProblemError as error:
                rounds = rounds_activations(layer.get_base_layer())
                advice = "direct" if rounds else "product=difference, or darts"
                raise ProblemError(
                    f"hypergradient={estimator.name!r} differentiates twice, which needs weights "
                    f"that can be read; choose {advice} ({error})"
                ) from error


def check_accelerator(trainer: Trainer, levels: Sequence[Problem], estimator: Estimator) -> None:
    """Raise ProblemError for a configuration of accelerate that would not train ``levels``."""
    if trainer.accelerator.mixed_precision == "fp16":
        raise ProblemError("fp16: the loss scale is part of the gradients; use bf16")
    if distributed.world_size() != trainer.args.world_size:
        raise ProblemError(
            f"world_size: there are {distributed.world_size()} processes, but the Trainer counts "
            f"{trainer.args.world_size}, so that each would train alone on all data and write to "
            "one folder; on CPUs set use_cpu=True"
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer, levels, estimator)
    elif trainer.args.fsdp:
        raise ProblemError("fsdp: accelerate has FSDP for GPUs only; use DDP on CPUs")


def _check_fsdp(trainer: Trainer, levels: Sequence[Problem], estimator: Estimator) -> None:
    if Version(transformers.__version__) < FSDP2_SINCE:
        raise ProblemError(
            f"fsdp: FSDP2 needs transformers {FSDP2_SINCE} or newer, got "
            f"{transformers.__version__}, which does not load sharded adapters; use DDP, or upgrade"
        )
    plugin, precision = trainer.accelerator.state.fsdp_plugin, trainer.accelerator.mixed_precision
    if plugin.fsdp_version != 2:
        raise ProblemError("fsdp_version: FSDP1 hides the parameters that a level owns; set 2")
    if "FULL" not in str(plugin.state_dict_type):
        raise ProblemError(
            "fsdp_state_dict_type: a sharded state dict is a pickle, and loading one could run "
            "code; set FULL_STATE_DICT"
        )
    if len(levels) > 1 and estimator.requirements.second_derivatives:
        raise ProblemError(f"{estimator.name}: {SHARDED}")
    if len(levels) > 1 and estimator.requirements.differences and precision != "no":
        raise ProblemError(
            f"mixed_precision: {precision} does not go with FSDP2, since a difference of gradients "
            "needs parameters in float32; turn it off, or choose direct or product=dots"
        )
    of_model = {id(parameter) for parameter in trainer.model.parameters()}
    for level in levels:
        inside = [id(variable) in of_model for variable in level.variables]
        if not any(inside) and level is not levels[0]:  # replicated
            if trainer.args.save_strategy != "no":
                raise ProblemError(
                    f"save_strategy: under FSDP2 a checkpoint has no optimizer state of "
                    f"{level.name}, whose variables are outside of the model; set no"
                )
        elif not all(inside):
            name = level.names[inside.index(False)]
            raise ProblemError(
                f"{level.name}: {name} is no parameter of the model, and FSDP2 shards no "
                "other tensors; make it a parameter"
            )
