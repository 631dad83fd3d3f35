"""hyperopt-peft merge: add an adapter to the weights of its base model, and check the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoTokenizer
from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.text.models import Dtype, load_base, load_config
from hyperopt_peft.cli.text.tasks import TASKS, Task
from hyperopt_peft.cli.train import BASE_CONFIG
from hyperopt_peft.errors import ProblemError

#: The largest difference of the logits in float32, relative to the largest logit.
TOLERANCE = 1e-4


@dataclass
class MergeArguments:
    """The adapter and the folder of the merged model."""

    _argument_group_name = "command"

    adapter: str = HfArg(help="the folder of the adapter")
    output_dir: str = HfArg(help="where the merged model is written; must be empty or not exist")
    model: str | None = HfArg(
        default=None, help="the base model; the one that the adapter names if not given"
    )
    dtype: Dtype = HfArg(
        default="float32",
        help="of the saved weights, which are merged in float32; auto: as the base model's were "
        "saved",
    )


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, merge in float32, compare the logits before and after, cast and save.

    Raises:
        ProblemError: a folder that is not empty, an adapter that does not fit the base model, or
            logits that differ by more than rounding; nothing is saved then.
    """
    (args,) = parse("merge", (MergeArguments,), argv)
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ProblemError(f"output_dir: {output} is not an empty folder; choose another")
    model, saved_dtype = load(args)
    tokenizer = tokenizer_of(args, model)
    merged, difference, largest = merge(model)
    print(f"logits before and after merging: largest difference {difference:.2g} of {largest:.2g}")
    merged.to(saved_dtype if args.dtype == "auto" else getattr(torch, args.dtype))
    merged.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    print(f"the merged model is in {output}{', without a tokenizer' if tokenizer is None else ''}")


def load(args: MergeArguments) -> tuple[Any, torch.dtype]:
    """The base model with the adapter in float32, by stock PEFT, and the dtype it was saved in.

    Raises:
        ProblemError: no adapter, an adapter of an unknown task, or one of another model.
    """
    folder = Path(args.adapter)
    if not (folder / "adapter_config.json").is_file():
        raise ProblemError(
            f"adapter: {folder} has no adapter_config.json; give the folder of an adapter"
        )
    try:
        adapter = PeftConfig.from_pretrained(args.adapter)
    except (ValueError, TypeError, KeyError) as error:
        raise ProblemError(
            f"adapter: {folder}/adapter_config.json cannot be read ({error}); save it again"
        ) from error
    name = args.model or adapter.base_model_name_or_path
    if not name:
        raise ProblemError(f"model: {folder} does not name its base model; give the model")
    saved = folder / BASE_CONFIG  # written by train, with the labels of a new head
    config = load_config(str(saved if saved.is_dir() else name))
    saved_dtype = config.dtype or torch.float32  # loading sets ``config.dtype``
    base, new = load_base(task_of(adapter), name, config, "float32")
    trained = set(adapter.modules_to_save or [])
    if lacking := [weight for weight in new if not trained & set(weight.split("."))]:
        raise ProblemError(
            f"model: {name} is not the adapter's base model, since {lacking[0]} and "
            f"{len(lacking) - 1} further weights are missing; give the base model"
        )
    try:
        return PeftModel.from_pretrained(base, args.adapter).eval(), saved_dtype
    except (RuntimeError, ValueError) as error:
        raise ProblemError(
            f"adapter: {folder} does not fit {name} ({error}); give the base model as model"
        ) from error


def task_of(adapter: Any) -> Task:
    """The task whose Auto class loads the adapter's base model.

    Raises:
        ProblemError: no task has the adapter's ``task_type``.
    """
    for task in TASKS.values():
        if task.peft == adapter.task_type:
            return task
    raise ProblemError(
        f"adapter: the task_type {adapter.task_type} is unknown; known are "
        f"{', '.join(sorted({task.peft for task in TASKS.values()}))}"
    )


@torch.no_grad()
def merge(model: Any) -> tuple[Any, float, float]:
    """The merged model, the largest difference of its logits to ``model``'s, the largest logit.

    Raises:
        ProblemError: the difference is more than rounding.
    """
    batch = random_batch(model.config)
    before: Tensor = model(**batch).logits
    merged = model.merge_and_unload()
    after: Tensor = merged(**batch).logits
    difference, largest = float((before - after).abs().max()), float(before.abs().max())
    limit = TOLERANCE * max(1.0, largest)
    if not difference <= limit:
        raise ProblemError(
            f"merge: the logits of the merged model differ by {difference:.2g}, more than the "
            f"tolerance {limit:.2g}; nothing was saved, use the adapter without merging"
        )
    return merged, difference, largest


def random_batch(config: Any, rows: int = 2, length: int = 16) -> dict[str, Tensor]:
    """Random tokens of shape (rows, length), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    ids = torch.randint(config.vocab_size, (rows, length), generator=generator)
    # A text classifier reads the last token that is not padding.
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch


def tokenizer_of(args: MergeArguments, model: Any) -> Any:
    """The tokenizer saved with the adapter, or the base model's, or None."""
    for name in (args.adapter, args.model or model.peft_config["default"].base_model_name_or_path):
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError):
            continue
    return None
