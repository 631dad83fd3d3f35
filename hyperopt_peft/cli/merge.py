"""hyperopt-peft merge: add an adapter to the weights of its base model, and check the result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer

from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.text.models import ModelArguments, load_base, load_config
from hyperopt_peft.cli.text.tasks import TASKS
from hyperopt_peft.cli.train import BASE_CONFIG
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.validation import option

#: The largest difference of the logits in float32, relative to the largest logit.
LOGIT_TOLERANCE = 1e-4


@dataclass
class MergeArguments:
    """The adapter and the folder of the merged model."""

    _argument_group_name = "command"

    adapter: str = option(help="the folder of the adapter")
    output_dir: str = option(help="where the merged model is written; must be empty or not exist")
    model: str | None = option(None, help="the base model; by default the adapter names it")
    dtype: Literal["float32", "bfloat16"] = option("float32", help="number format to save")


TYPES = (MergeArguments,)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, merge in float32, compare the logits before and after, cast and save."""
    (args,), _ = parse("merge", TYPES, argv)
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ProblemError(f"output_dir: {output} is not an empty folder; choose another")
    model, saved = _load(args), []
    for name in (args.model or model.peft_config["default"].base_model_name_or_path, args.adapter):
        with suppress(OSError, ValueError):
            saved = [AutoTokenizer.from_pretrained(name)]
    merged, difference, largest = merge(model)
    print(f"logits before and after merging: largest difference {difference:.2g} of {largest:.2g}")
    for part in (merged.to(getattr(torch, args.dtype)), *saved):
        part.save_pretrained(output)
    print(f"the merged model is in {output}{'' if saved else ', without a tokenizer'}")


def _load(args: MergeArguments) -> Any:
    """The base model with the adapter in float32, by stock PEFT."""
    folder = Path(args.adapter)
    try:
        adapter = PeftConfig.from_pretrained(args.adapter)
        kind: Any = next(each for each in TASKS if TASKS[each].peft == adapter.task_type)
    except (OSError, ValueError, TypeError, KeyError, StopIteration) as error:
        raise ProblemError(
            f"adapter: {folder}/adapter_config.json cannot be read or has no known task ({error}); "
            "give the folder of an adapter"
        ) from error
    name = args.model or adapter.base_model_name_or_path
    saved = folder / BASE_CONFIG  # written by train, with the labels of a new head
    config = load_config(str(saved if saved.is_dir() else name))
    if not hasattr(load_config(name), "quantization_config"):
        # The quantization by load_in_4bit would round the merged weights.
        vars(config).pop("quantization_config", None)
    base, new = load_base(TASKS[kind], ModelArguments(name, kind), config)
    trained = tuple(adapter.modules_to_save or [])
    if missing := [x for x in new if not any(part.endswith(trained) for part in x.split("."))]:
        raise ProblemError(
            f"model: {name} is not the adapter's base model: it lacks {missing[0]} and "
            f"{len(missing) - 1} more weights; give the base model"
        )
    try:
        return PeftModel.from_pretrained(base, args.adapter).eval()
    except (RuntimeError, ValueError) as error:
        raise ProblemError(
            f"adapter: {folder} does not fit {name}; give its base: {error}"
        ) from error


@torch.no_grad()
def merge(model: Any) -> tuple[Any, float, float]:
    """The merged model, the largest difference of its logits to ``model``'s, the largest logit."""
    length = min(16, getattr(model.config, "max_position_embeddings", None) or 16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    # A text classifier reads the last token that is not padding.
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    before = model(**batch).logits
    merged = model.merge_and_unload()
    difference = float((before - merged(**batch).logits).abs().max())
    largest = float(before.abs().max())
    limit = LOGIT_TOLERANCE * max(1.0, largest)
    if not difference <= limit:
        raise ProblemError(
            f"merge: the logits of the merged model differ by {difference:.2g}, more than the "
            f"tolerance {limit:.2g}; nothing was saved, use the adapter without merging"
        )
    return merged, difference, largest
