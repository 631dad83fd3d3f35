"""The settings: methods for one purpose, beside plain methods, on tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.methods.rows import first_rows, of_mpnet, of_sources, wrong_labels
from benchmarks.methods.tasks import METRICS, Task, task
from hyperopt_peft import BiDoRA, Method
from hyperopt_peft.comparison.choice import RATES, UPPER_RATES, Choice, Plan
from hyperopt_peft.comparison.task import Kind
from hyperopt_peft.problems import (
    SEAL,
    Agreement,
    AutoLoRA,
    BiLoRA,
    ClassOffsets,
    DoRA,
    EqualSources,
    FrequencyWeights,
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

#: Rates for few or doubtful rows, where small rates are best.
LOW_RATES = (6e-4, 2e-3, 6e-3, 2e-2)
ABLATED: tuple[Kind, ...] = ("frozen", "one level")
#: Layers with an adapter in MiniLM's last layer: queries and values, or all linear layers.
ATTENTION, LINEAR = r".*layer\.5\..*\.(query|value)", r".*layer\.5\..*\.(query|key|value|dense)"


@dataclass(frozen=True)
class Setting:
    """Methods for one purpose, with the tasks and budget of their comparison.

    Attributes:
        rows: makes a task by its name.
        methods: makes the methods; the others are compared with the first one.
        papers: the published bilevel methods among them; the others are simple alternatives.
        ablations: the methods whose ablations are trained; None for all.
        held_out: the share of the trusted rows, or of the training rows, that chooses the rates.
        targets: the layers that have an adapter.
        dropout: whether frozen layers have dropout; without it they are computed once.
        rates, upper_rates, seeds: arguments of `compare_methods` and its choice.
    """

    tasks: tuple[str, ...]
    rows: Callable[[str], Task]
    methods: Callable[[], dict[str, Method]]
    papers: tuple[str, ...]
    ablations: tuple[str, ...] | None
    targets: str = ATTENTION
    passes: float = 200
    batch: int = 8
    dropout: bool = False
    held_out: float = 0.2
    rates: Sequence[float] = (2e-3, 6e-3, 2e-2)
    upper_rates: Sequence[float] = (3e-3, 3e-2, 3e-1)
    seeds: Sequence[int] = range(5)

    def plan(self, task: str) -> Plan:
        """The runs of the comparison on a task."""
        choice = Choice(self.rates, self.upper_rates, held_out=self.held_out)
        shared = self.methods(), choice, self.seeds, METRICS.get(task, "accuracy"), False
        kinds = None if self.ablations is None else dict.fromkeys(self.ablations, ABLATED)
        return Plan(*shared, self.passes, kinds)


@dataclass
class KeptRows(LoRA):
    """LoRA on the trusted rows, and on the 80 % of the other rows with the most likely labels.

    A head on frozen features gives the likelihood. With ``trusted`` the head is trained on the
    trusted rows, else on the other folds of the rows themselves.
    """

    trusted: bool = True

    def all_rows(self, train: Any, upper: Any) -> Any:
        """The rows with likely labels, and the trusted rows."""
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        x, labels = np.array(train["features"][:]), np.array(train["target"][:])
        if self.trusted:
            classes = head.fit(upper["features"][:], upper["target"][:]).classes_
            found = head.predict_proba(x)
        else:
            classes = np.unique(labels)
            found = cross_val_predict(head, x, labels, cv=5, method="predict_proba")
        likely = (found * (labels[:, None] == classes)).sum(1)
        kept = np.sort(np.argsort(-likely, kind="stable")[: round(0.8 * len(likely))])
        return super().all_rows(train.select(kept), upper)


@dataclass
class DecayedLoRA(LoRA):
    """LoRA with weight decay in the optimizer."""

    decay: float = 0.1

    def __post_init__(self) -> None:
        """Set the weight decay."""
        super().__post_init__()
        with_arguments(self, weight_decay=self.decay)


def with_arguments(method: Method, **arguments: Any) -> Method:
    """``method`` with other default training arguments."""
    method.defaults = {**method.defaults, **arguments}
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
    """LoRA of half the rank, and so with half the parameters."""

    def adapter(self, config: Any) -> Any:
        """Halve r and α; their ratio does not change."""
        config.r, config.lora_alpha = config.r // 2, config.lora_alpha / 2
        return super().adapter(config)


def magnitudes(batch: int) -> dict[str, Method]:
    """LoRA, DoRA and two forms of BiDoRA; the published one has lower_steps=1."""
    batches = {"lower_steps": 1, "per_device_upper_batch_size": batch}
    published = with_arguments(BiDoRA.published(), **batches)
    return {"LoRA": LoRA(), "DoRA": DoRA(), "BiDoRA": BiDoRA(), "BiDoRA, published": published}


#: Upper batches of 64 rows contain most classes; a training then has few upper steps.
CLASSES: dict[str, Any] = {"per_device_upper_batch_size": 64, "lower_steps": 8}
#: The second phase of the stored runs of `RowWeights`.
WARM = {"retrain": "warm"}
SETTINGS = {
    "magnitudes": Setting(
        ("trec", "sst2", "tweets", "tags"),
        partial(first_rows, count=300),
        partial(magnitudes, batch=8),
        ("BiDoRA", "BiDoRA, published"),
        None,
        passes=300,
        rates=RATES,
        upper_rates=UPPER_RATES,
    ),
    "magnitudes, base size": Setting(
        ("cola", "sst2"),
        of_mpnet,
        partial(magnitudes, batch=16),
        ("BiDoRA", "BiDoRA, published"),
        ("BiDoRA",),
        r".*attn\.(q|k|v)",
        passes=187.5,
        batch=16,
        dropout=True,
        rates=(3e-4, 1e-3, 3e-3),
        upper_rates=(3e-3, 3e-2),
        seeds=range(3),
    ),
    "few rows": Setting(
        ("tweets", "sst2"),
        partial(first_rows, count=100),
        lambda: {
            "LoRA": LoRA(),
            "DoRA": DoRA(),
            "LoRA, weight decay 0.1": DecayedLoRA(),
            "LoRA, weight decay 1": DecayedLoRA(decay=1.0),
            "BiDoRA": BiDoRA(),
            "BiLoRA": BiLoRA(gamma=0.1),
            "LayerDecay": LayerDecay(),
            "LayerDecay, one for all layers": LayerDecay(shared=True),
        },
        ("BiDoRA", "BiLoRA", "LayerDecay"),
        ("BiDoRA", "BiLoRA", "LayerDecay"),
        LINEAR,
        rates=LOW_RATES,
    ),
    "ranks and layers": Setting(
        ("tweets", "sst2"),
        partial(first_rows, count=100),
        lambda: {
            "LoRA": LoRA(),
            "LoRA, r = 4": RankedLoRA(),
            "AutoLoRA": AutoLoRA(),
            "AutoLoRA, decay, half of the terms": AutoLoRA(decay=0.05, share=0.5),
            "random terms": AutoLoRA(share=0.5, choose="random"),
            "largest terms": AutoLoRA(share=0.5, choose="sizes"),
            "S3Delta": S3Delta(),
            "random layers": S3Delta(choose="random"),
            "largest layers": S3Delta(choose="sizes"),
        },
        ("AutoLoRA", "AutoLoRA, decay, half of the terms", "S3Delta"),
        ("AutoLoRA", "AutoLoRA, decay, half of the terms", "largest terms", "S3Delta"),
        LINEAR,
    ),
    "rare classes": Setting(
        ("newsgroups", "reuters"),
        partial(task, length=24),
        lambda: {
            "LoRA": LoRA(),
            "LoRA, α = 64": ScaledLoRA(),
            "LoRA, α = 4": ScaledLoRA(factor=0.25),
            "logit adjustment": LogitAdjustment(),
            "logit adjustment, τ = 0.5": LogitAdjustment(tau=0.5),
            "inverse-frequency weights": FrequencyWeights(),
            "inverse-frequency weights, root": FrequencyWeights(power=0.5),
            "logit adjustment, τ learned": with_arguments(TunedAdjustment(), **CLASSES),
            "ClassOffsets": with_arguments(ClassOffsets(), **CLASSES),
            "LayerScales": LayerScales(),
        },
        ("ClassOffsets", "LayerScales"),
        ("ClassOffsets", "LayerScales"),
        LINEAR,
        passes=300,
    ),
    "wrong labels": Setting(
        ("tweets", "trec"),
        wrong_labels,
        lambda: {
            "LoRA": LoRA(),
            "trusted rows alone": SomeSources(),
            "trusted rows 10 times": TrustedRepeated(),
            "loss under a trusted model": KeptRows(),
            "suspicion": KeptRows(trusted=False),
            "RowWeights": with_arguments(RowWeights(keep=0.8), **WARM),
            "RowWeights, 1 lower step": with_arguments(RowWeights(keep=0.8), lower_steps=1, **WARM),
            "SEAL": SEAL(),
        },
        ("RowWeights", "RowWeights, 1 lower step", "SEAL"),
        ("RowWeights", "SEAL"),
        rates=LOW_RATES,
        held_out=0.4,
    ),
    "sources": Setting(
        ("questions", "movies"),
        of_sources,
        lambda: {
            "LoRA": LoRA(),
            "each source alike": EqualSources(),
            "trusted rows alone": SomeSources(),
            "trusted rows 10 times": TrustedRepeated(),
            "weights by agreement": Agreement(log_odds=True),
            "Sources": Sources(),
            "Sources, 1 lower step": with_arguments(Sources(), lower_steps=1),
            "ScaleBiO": Sources.published("scalebio"),
            "FastMix": Sources.published("fastmix"),
            "DreamPRM": Sources.published("dreamprm"),
        },
        ("Sources", "Sources, 1 lower step", "ScaleBiO", "FastMix", "DreamPRM"),
        ("Sources",),
        rates=LOW_RATES,
        held_out=0.4,
    ),
}
