"""Checks before training: settings, levels and labels that a `BilevelTrainer` refuses."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from hyperopt_peft.adapters.layers import require_plain
from hyperopt_peft.core.prior import GaussianPrior
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import Estimator
from hyperopt_peft.hypergradients.estimate import check_ownership
from hyperopt_peft.hypergradients.products import SHARDED
from hyperopt_peft.trainer.optimizer import check_optimizers
from hyperopt_peft.trainer.over import loads_names
from hyperopt_peft.trainer.splits import label_column
from hyperopt_peft.trainer.upper_batches import loader_of
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.models import base_model, require_no_rounding, rounds_activations
from hyperopt_peft.utils.precision import require_float32
from hyperopt_peft.utils.validation import require_writable

logger = logging.get_logger(__name__)
#: The least rate × steps with which an adapter learns: twice the distance that Adam moves a weight
#: under linear decay. DoRA's held-out score on five tasks was 0.46 at 0.03, 0.60 at 0.1 and 0.68 to
#: 0.70 at 0.3 or more, whether by more steps or by a higher rate.
LEARNS = 0.1
#: Settings that do not work in bilevel training, and the reasons.
REFUSED = {
    "fsdp": "one process has nothing to shard; start several, or use DDP",
    "n_gpu": "its threads split the batch; start one process a device, with torchrun",
    "auto_find_batch_size": "the Trainer starts again in a step; give per_device_train_batch_size",
    "torch_compile": "the levels call the model and not its wrapper; use model.compile()",
    "torch_empty_cache_steps": "a step has many passes; empty the cache in a callback",
    "activation_offloading": "estimators' passes do not offload; use gradient_checkpointing",
    "layer_offloading": "second derivatives read weights after they have left; use 4-bit weights",
    "deepspeed": "DeepSpeed does not expose gradients; use DDP or FSDP2",
    "model_init": "levels own the tensors of one model; make the model first",
}


def warn_of_short_phase(phase: str, args: Any, rows: int) -> None:
    """Log a warning if ``phase``, on ``rows`` rows, has too few Adam steps to learn.

    A run without logs, such as one of many in a comparison, does not warn.
    """
    if args.logging_strategy == "no":
        return
    steps = args.steps_of(rows) if rows else args.max_steps
    if 0 < args.learning_rate * steps < LEARNS and "adam" in args.optim:
        logger.warning_once(
            f"{phase}: {steps} steps at a learning rate of {args.learning_rate:g} hardly train an "
            f"adapter; give it {math.ceil(LEARNS / args.learning_rate)} steps or a higher rate"
        )


def check_arguments(trainer: Any, model: Any, args: Any, options: Mapping[str, Any]) -> None:
    """Raise ProblemError for a model or settings that do not work in bilevel training."""
    if args.should_save and args.save_strategy != "no":
        require_writable(Path(args.output_dir))
    values = {**vars(args), **options, "n_gpu": args.n_gpu > 1}
    values["fsdp"] = args.fsdp and distributed.world_size() == 1
    values["deepspeed"] = args.deepspeed or getattr(args, "deepspeed_plugin", None)
    for name, reason in REFUSED.items():
        if values.get(name):
            raise ProblemError(f"{name}: not possible in bilevel training, since {reason}")
    if any(x.__module__.startswith("trl.") for x in trainer.parent().__mro__) and _trl() < (0, 24):
        logger.warning_once("trl: TRL before 0.24 was not tried; if a run fails, update it")
    if not isinstance(model, nn.Module) and not loads_names(trainer.parent()):
        raise ProblemError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_levels(trainer: Any) -> None:
    """Raise ProblemError for levels that do not fit together, or not the rest of ``trainer``.

    The argument ``upper_prior`` becomes the upper level's prior.
    """
    levels, estimator = trainer.levels, trainer.estimator
    _check_settings(levels)
    if trainer.upper is not None and (tau := trainer.args.upper_prior) is not None:
        if trainer.upper.prior is not None:
            raise ProblemError(
                f"upper_prior: the level {trainer.upper.name} has a prior; leave one of them out"
            )
        trainer.upper.prior = GaussianPrior(tau, trainer.upper.variables)
    _check_layers(trainer.model, levels, estimator)
    _check_accelerator(trainer, levels, estimator)
    _check_router_loss(trainer, levels)
    check_optimizers("optimizers", trainer.optimizer, trainer.lr_scheduler, levels)
    loader_of(trainer, trainer.train_dataset, "train_dataset")  # refuses what no model can read


def _check_settings(levels: Sequence[Problem]) -> None:
    """Raise ProblemError for nested levels, shared tensors, or settings the trainer owns."""
    for level in levels:
        if isinstance(level, Problem):  # else refused below
            level.require_single("a trainer has two levels; use the Engine")
    check_ownership(*levels)
    for level in levels:
        for name in ("batches", "optimizer", "scheduler", "max_grad_norm"):
            if getattr(level, name) is not None:
                raise ProblemError(
                    f"{level.name}: the level has {name.replace('batches', 'data')}, which the "
                    "trainer's arguments set; leave it out, or use the Engine"
                )


def check_rows(model: Any, data: Any, options: Mapping[str, Any]) -> None:
    """Raise ProblemError for a label without an output of ``model``, or a row that is too long.

    The user's own collator or loss function may change the rows; then nothing is checked.
    """
    collator = options.get("data_collator")
    changed = collator is not None and not collator.__module__.startswith("transformers.")
    if not (changed or options.get("compute_loss_func")) and isinstance(data, Dataset) and data:
        _check_labels(model, data)
        _check_lengths(model, data)


def _check_labels(model: Any, data: Dataset) -> None:
    config = getattr(model, "config", None)
    kind = type(base_model(model)).__name__
    classes = getattr(config, "num_labels", 1)
    single = getattr(config, "problem_type", None) in (None, "single_label_classification")
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
            f"{column}: the data has class {largest}, but the model's num_labels is {classes} "
            f"(classes 0 to {classes - 1}); load the model with num_labels={largest + 1}"
        )


def _check_lengths(model: Any, data: Dataset) -> None:
    """A row may have as many tokens as ``model`` has positions, unless it computes them."""
    most: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not most or "input_ids" not in data.column_names or data.format["type"] == "custom":
        return
    limits = [  # some tables begin with unused positions: up to the padding's, or `offset`
        min(most, table.num_embeddings - getattr(table, "offset", 1 + (table.padding_idx or -1)))
        for name, table in base_model(model).named_modules()
        if isinstance(table, nn.Embedding) and table.num_embeddings >= most
        if name.endswith(("position_embeddings", "position_embedding", "embed_positions", "wpe"))
    ]
    tables = data.select_columns("input_ids").with_format("arrow").iter(1000) if limits else ()
    parts = [part for table in tables for part in table.column("input_ids").chunks]
    lengths = [length for part in parts for length in part.value_lengths().to_pylist()]
    longest, limit = max(lengths, default=0), min(limits, default=0)
    if longest > limit:
        raise ProblemError(
            f"input_ids: row {lengths.index(longest)} has {longest} tokens, and the model "
            f"positions for {limit}; tokenize with truncation=True, max_length={limit}"
        )


def read_rows(trainer: Any, rows: Any = None, name: str = "train_dataset") -> Any:
    """``rows``, the training rows by default, with the columns that the model or a level reads."""
    rows = trainer.train_dataset if rows is None else rows
    if not isinstance(rows, Dataset):
        return rows
    return rows.select_columns(loader_of(trainer, rows, name).dataset.column_names)


def _check_layers(model: nn.Module, levels: Sequence[Problem], estimator: Estimator) -> None:
    """Raise ProblemError for layers that the estimator cannot differentiate, before any step.

    They round activations, lack float32 or hide their weights.
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
                    f"hypergradient={estimator.name!r} needs second derivatives, so weights must "
                    f"be readable; choose {advice} ({error})"
                ) from error


def _check_accelerator(trainer: Trainer, levels: Sequence[Problem], estimator: Estimator) -> None:
    """Raise ProblemError for a configuration of accelerate that would not train ``levels``."""
    if trainer.accelerator.mixed_precision == "fp16":
        raise ProblemError("fp16: the loss scale is part of the gradients; use bf16")
    if distributed.world_size() != trainer.args.world_size:
        raise ProblemError(
            f"world_size: there are {distributed.world_size()} processes, but the Trainer counts "
            f"{trainer.args.world_size}, so each would train alone on all data and write to the "
            "same folder; on CPUs set use_cpu=True"
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer, levels, estimator)
    elif trainer.args.fsdp:
        raise ProblemError("fsdp: accelerate has FSDP for GPUs only; use DDP on CPUs")


def _check_router_loss(trainer: Any, levels: Sequence[Problem]) -> None:
    """Raise ProblemError if TRL would add a router's auxiliary loss to each of several batches."""
    several = len(levels) > 1 or trainer.args.gradient_accumulation_steps > 1
    if several and getattr(trainer, "aux_loss_enabled", False) and _trl() < (1, 15):
        raise ProblemError(
            "router_aux_loss_coef: TRL before 1.15 adds the router's auxiliary loss to each "
            "micro-batch of a step undivided; install trl>=1.16, or set 0"
        )


def _trl() -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version("trl").split(".")[:2]))


def _check_fsdp(trainer: Trainer, levels: Sequence[Problem], estimator: Estimator) -> None:
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
            f"mixed_precision: {precision} does not go with FSDP2, since a difference of "
            "gradients needs float32 parameters; turn it off, or choose direct or product=dots"
        )
    of_model = {id(parameter) for parameter in trainer.model.parameters()}
    for level in levels:
        inside = [id(variable) in of_model for variable in level.variables]
        if not any(inside) and level is not levels[0]:  # replicated
            if trainer.args.save_strategy != "no":
                raise ProblemError(
                    f"save_strategy: under FSDP2 a checkpoint lacks the optimizer state of "
                    f"{level.name}, whose variables are outside the model; set no"
                )
        elif not all(inside):
            name = level.names[inside.index(False)]
            raise ProblemError(
                f"{level.name}: {name} is not a parameter of the model, and FSDP2 shards only "
                "parameters; make it one"
            )
