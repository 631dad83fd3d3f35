"""Small models with tokenizers, and data files, as a user of the command line has them."""

import json
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.support.trainers import base_model

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[EOS]"]
KINDS = {
    "text-classification": "classes",
    "regression": "regression",
    "token-classification": "tokens",
    "causal-lm": "causal",
    "seq2seq": "seq2seq",
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token; ``[EOS]`` ends a text."""
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="$A [EOS]", pair="$A [EOS] $B [EOS]", special_tokens=[("[EOS]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


def save_model(folder: Path, task: str = "text-classification", **config: Any) -> Any:
    """A model of the task without a head of the right size, and its tokenizer."""
    model = base_model(KINDS[task], dropout=0.0)
    model.config.update(config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def rows(task: str = "text-classification", number: int = 24, seed: int = 0) -> list[Any]:
    """Texts whose first word says the label."""
    generator = torch.Generator().manual_seed(seed)
    words = [
        [WORDS[i] for i in torch.randint(3, 40, (5,), generator=generator)] for _ in range(number)
    ]
    for row, text in enumerate(words):
        text[0] = WORDS[row % 3]
    if task == "token-classification":
        return [
            {"tokens": text, "tags": [["O", "B", "I"][int(w[1:]) % 3] for w in text]}
            for text in words
        ]
    texts = [" ".join(text) for text in words]
    if task == "text-classification":
        return [{"text": t, "label": "abc"[row % 3]} for row, t in enumerate(texts)]
    if task == "regression":
        return [{"text": t, "label": row % 7 / 2} for row, t in enumerate(texts)]
    if task == "seq2seq":
        return [{"text": t, "target": " ".join(t.split()[::-1])} for t in texts]
    return [{"text": t} for t in texts]


def write(path: Path, data: Any) -> Any:
    """``data`` in the format that the file's name says; returns the path as text."""
    kind = path.suffix
    if kind == ".csv":
        Dataset.from_list(data).to_csv(path)
    elif kind == ".parquet":
        Dataset.from_list(data).to_parquet(path)
    elif kind == ".json":
        path.write_text(json.dumps(data))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


def flags(**options: Any) -> Any:
    result = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words = [json.dumps(x) if isinstance(x, dict) else str(x) for x in values]
        result += [f"--{name}", *words]
    return result


SMALL = {
    "rank": 2,
    "alpha": 4,
    "max_length": 16,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "upper_learning_rate": 1e-2,
    "max_steps": 4,
    "lower_steps": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 3,
}
