"""The base model, its tokenizer and the adapter, from options, and checks of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.hf_argparser import HfArg
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hyperopt_peft.adapters.layers import PLAIN_MODULES
from hyperopt_peft.adapters.peft_internals import SEQ_CLS_HEAD_NAMES
from hyperopt_peft.cli.text.tasks import Task, TaskName
from hyperopt_peft.errors import ProblemError, did_you_mean

ALL_LINEAR = "all-linear"
Dtype = Literal["float32", "bfloat16", "auto"]


@dataclass
class ModelArguments:
    """The model, the task and the adapter."""

    _argument_group_name = "model and adapter"

    model: str = HfArg(help="the base model: a local folder or a hub name")
    task: TaskName = HfArg(help="the task to learn")
    tokenizer: str | None = HfArg(default=None, help="the tokenizer; the model's if not given")
    dtype: Dtype = HfArg(
        default="float32", help="of the base model's weights; auto: as they were saved"
    )
    rank: int = HfArg(default=8, help="rank r of B·A")
    alpha: int = HfArg(default=16, help="LoRA's alpha; the scale of B·A is alpha / rank")
    dropout: float = HfArg(default=0.0, help="dropout on the adapter's input")
    target_modules: list[str] = HfArg(
        default_factory=lambda: [ALL_LINEAR],
        help="names (or ends of names) of the modules to adapt, or all-linear",
    )
    modules_to_save: list[str] | None = HfArg(
        default=None, help="modules that are trained in full; a new head of the task always is"
    )

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise ProblemError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ProblemError(f"dropout must be in [0, 1), got {self.dropout}")


def load_config(name: str) -> Any:
    """The configuration of the model ``name``.

    Raises:
        ProblemError: the model does not exist.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ProblemError(f"model: {_why_not(name, error)}") from error


def _why_not(name: str, error: Exception) -> str:
    """Why loading ``name`` failed; the hub's own message does not know that it may be a path."""
    if Path(name).is_dir():
        reason = str(error).partition("Model type should be one of")[0]  # a hundred names
        return f"cannot load the folder {name}: {reason}"
    if isinstance(error.__cause__, FileNotFoundError):  # no entry in the cache
        return (
            f"{name} is neither a folder nor in the local cache, and the hub cannot be reached; "
            "correct the name, or connect once to download it"
        )
    if isinstance(error.__cause__, ValueError):  # no valid name on the hub
        return f"there is no folder {name}"
    return f"cannot load {name}: {error}"


def labelled(config: Any, task: str, names: Sequence[str]) -> Any:
    """``config`` with the head of ``task``: one output for each class, or one number."""
    if task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    elif names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        if task == "text-classification":
            config.problem_type = "single_label_classification"
    return config


def load_tokenizer(name: str, config: Any, max_length: int, task: str) -> Any:
    """The tokenizer ``name``, with a padding token, for texts of ``max_length`` tokens.

    Raises:
        ProblemError: the tokenizer does not exist or does not fit the model or the task, or
            ``max_length`` exceeds the model's limit.
    """
    words = task == "token-classification"
    # Byte-level tokenizers need this for lists of words.
    options = {"add_prefix_space": True} if words else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ProblemError(f"tokenizer: {_why_not(name, error)}") from error
    limit = min(
        tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or max_length
    )
    if max_length > limit:
        raise ProblemError(
            f"max_length={max_length} is more than the model's {limit} tokens; give "
            f"max_length={limit} or less"
        )
    if len(tokenizer) > (getattr(config, "vocab_size", None) or len(tokenizer)):
        raise ProblemError(
            f"tokenizer: {name!r} has {len(tokenizer)} tokens, the model {config.vocab_size}; give "
            "the tokenizer of the model"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ProblemError(
                f"tokenizer: {name!r} has neither a padding nor an end-of-text token; give another"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if words and not tokenizer.is_fast:
        raise ProblemError(
            f"tokenizer: {name!r} is not fast, which token-classification needs; give another"
        )
    return tokenizer


def load_base(task: Task, name: str, config: Any, dtype: Dtype) -> tuple[Any, list[str]]:
    """The base model, and the names of its new weights, which depend on the current seed.

    Raises:
        ProblemError: the model does not exist or has no class for the task.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the report on a new head has forty lines
    try:
        model, report = task.model.from_pretrained(
            name,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ProblemError(f"model: {_why_not(name, error)}") from error
    finally:
        logging.set_verbosity(level)
    mismatched = [entry[0] for entry in report["mismatched_keys"]]
    return model, sorted({*report["missing_keys"], *mismatched})


def adapted(model: Any, args: ModelArguments, task: Task, *, dora: bool) -> Any:
    """``model`` in train mode with a new adapter, whose A depends on the current seed.

    Raises:
        ProblemError: an unknown target module, or a module that cannot be adapted.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
    for name in args.modules_to_save or []:
        if name not in names:
            raise ProblemError(f"modules_to_save: no module {name!r}{did_you_mean(name, names)}")
    targets = require_targets(model, args.target_modules)
    if targets == [ALL_LINEAR]:
        targets = linear_layers(model, besides=[*SEQ_CLS_HEAD_NAMES, *(args.modules_to_save or [])])
    config = LoraConfig(
        task_type=task.peft,
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules=targets,
        modules_to_save=args.modules_to_save and [*args.modules_to_save],  # PEFT extends it
        use_dora=dora,
    )
    try:
        return get_peft_model(model, config).train()
    except (ValueError, TypeError) as error:
        raise ProblemError(f"target_modules: the model cannot be adapted: {error}") from error


def require_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """``targets``, each the name of a layer that DoRA can adapt, or all-linear.

    Raises:
        ProblemError: an unknown name, a module that DoRA cannot adapt, or a model without such
            layers.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    plain = {name for name, module in modules.items() if isinstance(module, PLAIN_MODULES)}
    if not plain:
        raise ProblemError(
            f"{type(model).__name__} has no layer that DoRA can adapt: no linear, Conv1D, "
            "embedding or convolution; give another model"
        )
    if list(targets) == [ALL_LINEAR]:
        return list(targets)
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        leaves = sorted({name.rpartition(".")[2] for name in plain})
        if not found:
            raise ProblemError(
                f"target_modules: no module {target!r}{did_you_mean(target, leaves)}"
            )
        if other := [name for name in found if name not in plain]:
            kind = type(modules[other[0]]).__name__
            raise ProblemError(
                f"target_modules: {other[0]} is a {kind}, which DoRA cannot adapt; choose among "
                f"{', '.join(leaves)}"
            )
    return list(targets)


def linear_layers(model: Any, besides: Sequence[str]) -> list[str]:
    """All linear layers except the output layer and those in modules with a name in ``besides``.

    The ``all-linear`` of PEFT would adapt the head of a token classifier and ``modules_to_save``.
    """
    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and not set(name.split(".")) & set(besides)
    ]


def untrained(model: Any, new: Sequence[str]) -> list[str]:
    """The ``new`` weights of the base model that the PeftModel ``model`` does not train."""
    trained = [
        name.replace(".modules_to_save.default", "")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return [name for name in new if not any(own.endswith(f".{name}") for own in trained)]
