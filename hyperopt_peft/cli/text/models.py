"""The base model, its tokenizer and the adapter: made from options, and checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from hyperopt_peft.cli.text.tasks import Task, TaskName
from hyperopt_peft.errors import ProblemError, did_you_mean
from hyperopt_peft.utils.validation import option

ALL_LINEAR = "all-linear"
#: The names of classification heads, which PEFT trains in full.
HEADS = "score", "classifier"


@dataclass
class ModelArguments:
    """The model, the task and the adapter."""

    _argument_group_name = "model and adapter"

    model: str = option(help="the base model: a local folder or a hub name")
    task: TaskName = option(help="the task to learn; sft trains with TRL")
    tokenizer: str | None = option(None, help="the tokenizer; the model's if not given")
    dtype: Literal["float32", "bfloat16", "auto"] = option(
        "float32", help="base model; auto: as saved"
    )
    load_in_4bit: bool = option(False, help="load the base model in NF4, by bitsandbytes")
    rank: int = option(8, help="rank r of the adapter B·A")
    alpha: int = option(16, help="LoRA's alpha; the scale of B·A is alpha / rank")
    dropout: float = option(0.0, help="dropout on the adapter's input")
    target_modules: list[str] = option(
        default_factory=lambda: [ALL_LINEAR], help="modules to adapt, by names or the ends of names"
    )
    modules_to_save: list[str] | None = option(None, help="modules to train in full")

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.task not in ("causal-lm", "sft"):
            raise ProblemError(f"load_in_4bit: is for causal-lm and sft, got task {self.task}")


def load_config(name: str, task: str, names: Sequence[str]) -> Any:
    """The configuration of the model ``name`` with a head for ``task`` and the classes."""
    with _loading("model", name):
        config = AutoConfig.from_pretrained(name)
    if task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    elif names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        if task == "text-classification":
            config.problem_type = "single_label_classification"
    return config


@contextmanager
def _loading(option: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        what = f"the folder {name} cannot be loaded"
        if not Path(name).is_dir():
            what = f"there is no folder {name}, and the hub or its cache gives nothing"
        reason = shorten(str(error), 300)  # a list of all kinds of models is longer
        raise ProblemError(f"{option}: {what} ({reason}); correct the name or folder") from error


def load_tokenizer(name: str, config: PretrainedConfig, max_length: int, task: str) -> Any:
    """The tokenizer ``name`` with a padding token, if it fits model, task and ``max_length``."""
    # Byte-level tokenizers need it for words.
    options = {"add_prefix_space": True} if task == "token-classification" else {}
    with _loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    positions = getattr(config, "max_position_embeddings", None) or max_length
    limit = min(tokenizer.model_max_length, positions)
    if not 1 < max_length <= limit:
        raise ProblemError(f"max_length: the model reads 2 to {limit} tokens, got {max_length}")
    size = getattr(config, "vocab_size", None) or len(tokenizer)
    if (count := len(tokenizer)) > size:
        raise ProblemError(f"tokenizer: {name} has {count} tokens, the model {size}; give its own")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ProblemError(f"tokenizer: {name} has no padding or end-of-text token; give another")
    return tokenizer


def load_base(task: Task, args: ModelArguments, config: PretrainedConfig) -> tuple[Any, list[str]]:
    """The base model, and the names of its new weights, which depend on the current seed."""
    bits: Any = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, **bits) if args.load_in_4bit else None
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the report on a new head has forty lines
    try:
        with _loading("model", args.model):
            model, report = task.model.from_pretrained(
                args.model,
                config=config,
                dtype=args.dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                quantization_config=nf4,
            )
    except ImportError as error:
        text = f"load_in_4bit: {error}; run pip install 'hyperopt-peft[bitsandbytes]'"
        raise ProblemError(text) from error
    finally:
        logging.set_verbosity(level)
    mismatched = [entry[0] for entry in report["mismatched_keys"]]
    return model, sorted({*report["missing_keys"], *mismatched})


def adapter_config(model: PreTrainedModel, args: ModelArguments, task: Task) -> LoraConfig:
    """The LoRA of the options for ``model``, which a method may change."""
    modules = [name for name, _ in model.named_modules() if name]
    endings = {name.rpartition(".")[2] for name in modules}
    for given in ("target_modules", "modules_to_save"):
        for name in getattr(args, given) or []:
            if name != ALL_LINEAR and not any(f".{each}".endswith(f".{name}") for each in modules):
                raise ProblemError(f"{given}: no module {name!r}{did_you_mean(name, endings)}")
    whole = args.target_modules == [ALL_LINEAR]
    heads = (*HEADS, *(args.modules_to_save or []))
    trained = [x for x in heads if any(name.endswith(x) for name in modules)]  # as PEFT finds them
    most = max((min(p.shape) for p in model.parameters() if p.dim() > 1), default=args.rank)
    if args.rank > most:
        raise ProblemError(f"rank: {args.rank} is above {most}, the largest of a weight; lower it")
    # By all-linear PEFT means modules that are trained in full too.
    exclude = rf".*({'|'.join(map(re.escape, trained))})(\..*)?" if whole and trained else None
    return LoraConfig(
        task_type=task.peft,
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules=ALL_LINEAR if whole else [*args.target_modules],
        exclude_modules=exclude,
        modules_to_save=args.modules_to_save and [*args.modules_to_save],  # PEFT extends it
    )
