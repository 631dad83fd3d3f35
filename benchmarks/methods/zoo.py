"""The zoo: each published method in a setting like its paper's, beside the plain ways to do it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.measure import keep_memory
from benchmarks.methods.tasks import DATA, Task, collate, rows_of_texts, score, task
from benchmarks.sources import draw, texts_of
from hyperopt_peft import BiDoRA, BilevelTrainingArguments, Method, compare_methods
from hyperopt_peft.comparison import Comparison
from hyperopt_peft.problems import (
    SEAL,
    Agreement,
    AutoLoRA,
    BiLoRA,
    ClassOffsets,
    DoRA,
    EqualSources,
    FrequencyWeights,
    GivenWeights,
    LayerDecay,
    LayerScales,
    LogitAdjustment,
    LoRA,
    RowWeights,
    S3Delta,
    SomeSources,
    Sources,
    TrustedRepeated,
    TunedAdjustment,
)
from hyperopt_peft.problems.features import features_of

RESULTS = Path(__file__).parents[1] / "results/methods"
SEEDS, DEVELOPMENT = range(5), range(100, 102)
RATES, UPPER_RATES = (2e-3, 6e-3, 2e-2), (3e-3, 3e-2, 3e-1)
#: Of the last layer: the queries and values, and all linear ones.
ATTENTION, ALL = r".*layer\.5\..*\.(query|value)", r".*layer\.5\..*\.(query|key|value|dense)"


@dataclass(frozen=True)
class Setting:
    """Methods with the same purpose, and where they are compared.

    Attributes:
        rows: the rows of a task by its name.
        methods: makes them; the first one is what the others are compared with.
        targets: the layers that have an adapter.
        ablations: the methods whose ablations are trained.
    """

    tasks: tuple[str, ...]
    rows: Callable[[str], Task]
    methods: Callable[[], dict[str, Method]]
    ablations: tuple[str, ...]
    targets: str = ATTENTION
    passes: int = 200


def few_rows(name: str) -> Task:
    """A hundred training rows."""
    here = task(name)
    return Task(here.train.select(range(100)), here.test, here.classes, here.metric)


def wrong_labels(name: str) -> Task:
    """300 rows of which 30 % have a wrong label, and 60 trusted ones.

    Columns ``by_loss`` and ``by_doubt`` are 1 for the 80 % of rows that a head on frozen features
    would keep: one trained on the trusted rows, and one that has not seen the row's own fold.
    """
    here, drawn = task(name), random.Random(0)
    rows = here.train.select(range(300)).to_list()
    for row in rows:
        if drawn.random() < 0.3:
            others = [each for each in range(here.classes) if each != row["target"]]
            row["target"] = drawn.choice(others)
    trusted = here.train.select(range(300, 360))
    model = here.base_model()
    made = [features_of(model, each, collate) for each in (Dataset.from_list(rows), trusted)]
    (x, y), (x_trusted, y_trusted) = ((each.x.numpy(), each.labels.numpy()) for each in made)
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    right = np.zeros(len(y))
    known = head.fit(x_trusted, y_trusted).predict_proba(x)
    for k, label in enumerate(head.classes_):
        right[y == label] = known[y == label, k]
    own = cross_val_predict(head, x, y, cv=5, method="predict_proba")
    columns = {"by_loss": right, "by_doubt": own[np.arange(len(y)), np.unique(y).searchsorted(y)]}
    train = Dataset.from_list(rows).add_column("source", ["all"] * len(rows))
    for column, value in columns.items():
        kept = value >= np.quantile(value, 0.2)
        train = train.add_column(column, kept.astype(float).tolist())
    return Task(train, here.test, here.classes, trusted=trusted)


def of_sources(name: str) -> Task:
    """Sources of unknown worth, and 60 trusted rows."""
    random.seed(0)
    texts, labels, more = texts_of(name, DATA)
    sources, trusted, test = draw(labels, more, 60)
    rows = rows_of_texts(texts, [0] * len(texts), 16)
    named = [
        {**rows[row], "target": label, "source": source}
        for source, pairs in sources.items()
        for row, label in pairs
    ]
    random.shuffle(named)
    clean = [[{**rows[row], "target": labels[row]} for row in each] for each in (trusted, test)]
    trusted, test = map(Dataset.from_list, clean)
    return Task(Dataset.from_list(named), test, 1 + max(labels), trusted=trusted)


@dataclass
class KeptRows(GivenWeights):
    """The rows whose ``column`` is 1, and the trusted ones."""

    column: str = "weight"

    def rows(self, train: Any, upper: Any) -> tuple[Any, Any]:
        """With the column as weights."""
        return super().rows(train.rename_column(self.column, "weight"), upper)


@dataclass
class DecayedLoRA(LoRA):
    """LoRA with a weight decay of the optimizer."""

    decay: float = 0.1

    def __post_init__(self) -> None:
        """Ask for the decay."""
        super().__post_init__()
        with_arguments(self, weight_decay=self.decay)


def with_arguments(method: Method, **arguments: Any) -> Method:
    """``method`` with other arguments of a training."""
    method.__dict__["defaults"] = {**method.defaults, **arguments}
    return method


@dataclass
class ScaledLoRA(LoRA):
    """LoRA with α times ``factor``."""

    factor: float = 4.0

    def adapter(self, config: Any) -> Any:
        """Set α."""
        config.lora_alpha *= self.factor
        return super().adapter(config)


@dataclass
class RankedLoRA(LoRA):
    """LoRA of half the rank, and so of half the parameters."""

    def adapter(self, config: Any) -> Any:
        """Set r and α, whose ratio stays."""
        config.r, config.lora_alpha = config.r // 2, config.lora_alpha / 2
        return super().adapter(config)


#: Upper batches of 64 rows have most classes; a training then has few upper steps.
CLASSES: dict[str, Any] = {"per_device_upper_batch_size": 64, "lower_steps": 8}
SETTINGS = {
    "few rows": Setting(
        ("tweets", "sst2"),
        few_rows,
        lambda: {
            "LoRA": LoRA(),
            "DoRA": DoRA(),
            "LoRA, weight decay 0.1": DecayedLoRA(),
            "BiDoRA": BiDoRA(),
            "BiLoRA": BiLoRA(gamma=0.1),
            "LayerDecay": LayerDecay(),
            "LayerDecay, one for all layers": LayerDecay(shared=True),
        },
        ("BiDoRA", "BiLoRA", "LayerDecay"),
        ALL,
    ),
    "ranks and layers": Setting(
        ("tweets", "sst2"),
        few_rows,
        lambda: {
            "LoRA": LoRA(),
            "LoRA, r = 4": RankedLoRA(),
            "AutoLoRA": AutoLoRA(decay=0.05),
            "AutoLoRA, random terms": AutoLoRA(decay=0.05, choose="random"),
            "AutoLoRA, largest terms": AutoLoRA(decay=0.05, choose="sizes"),
            "S3Delta": S3Delta(),
            "S3Delta, random layers": S3Delta(choose="random"),
            "S3Delta, largest layers": S3Delta(choose="sizes"),
        },
        ("AutoLoRA", "S3Delta"),
        ALL,
    ),
    "rare classes": Setting(
        ("newsgroups", "reuters"),
        partial(task, length=24),
        lambda: {
            "LoRA": LoRA(),
            "LoRA, α = 64": ScaledLoRA(),
            "logit adjustment": LogitAdjustment(),
            "inverse-frequency weights": FrequencyWeights(),
            "logit adjustment, τ learned": with_arguments(TunedAdjustment(), **CLASSES),
            "ClassOffsets": with_arguments(ClassOffsets(factor=True), **CLASSES),
            "LayerScales": LayerScales(),
        },
        ("ClassOffsets", "LayerScales"),
        ALL,
        passes=300,
    ),
    "wrong labels": Setting(
        ("tweets", "trec"),
        wrong_labels,
        lambda: {
            "LoRA": LoRA(),
            "trusted rows alone": SomeSources(),
            "trusted rows 10 times": TrustedRepeated(),
            "loss under a trusted model": KeptRows("by_loss"),
            "suspicion": KeptRows("by_doubt"),
            "RowWeights": RowWeights(),
            "SEAL": SEAL(),
        },
        ("RowWeights", "SEAL"),
    ),
    "sources": Setting(
        ("questions", "raters"),
        of_sources,
        lambda: {
            "LoRA": LoRA(),
            "each source alike": EqualSources(),
            "trusted rows alone": SomeSources(),
            "trusted rows 10 times": TrustedRepeated(),
            "weights by agreement": Agreement(log_odds=True),
            "Sources": Sources(),
            "ScaleBiO": Sources.published("scalebio"),
            "FastMix": Sources.published("fastmix"),
            "DreamPRM": Sources.published("dreamprm"),
        },
        ("Sources",),
    ),
}


def compared(setting: str, name: str, where: Path | None = None, **options: Any) -> Comparison:
    """The comparison of a setting on a task, kept in the folder ``where``."""
    from text_data import quiet

    quiet()
    torch.set_num_threads(1)
    keep_memory()
    torch.manual_seed(0)
    chosen = SETTINGS[setting]
    here = chosen.rows(name)
    arguments: dict[str, Any] = {"remove_unused_columns": False, "report_to": "none"}
    arguments |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 100}
    settings: dict[str, Any] = {"seeds": SEEDS, "development": DEVELOPMENT, "rates": RATES}
    settings |= {"upper_rates": UPPER_RATES, "ablations": chosen.ablations}
    return compare_methods(
        chosen.methods(),
        here.base_model,
        LoraConfig(
            r=8, lora_alpha=16, target_modules=chosen.targets, modules_to_save=["classifier"]
        ),
        BilevelTrainingArguments("unused", use_cpu=True, warmup_steps=0.1, **arguments),
        train_dataset=here.train,
        upper_dataset=here.trusted,
        test_dataset=here.test,
        metric=here.metric,
        frozen_dropout=False,
        folder=where,
        data_collator=collate,
        compute_metrics=score,
        **{"passes": chosen.passes, **settings, **options},
    )
