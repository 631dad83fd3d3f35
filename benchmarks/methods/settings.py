"""The settings: for each kind of problem, methods beside simple ways, on tasks, at budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.methods.rows import first_rows, of_sources, on_features, wrong_labels
from benchmarks.methods.simple import DecayedLoRA, KeptRows, with_arguments
from benchmarks.methods.tasks import METRICS, Task, task
from hyperopt_peft import BiDoRA, Method
from hyperopt_peft.comparison import Choice
from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.problems import (
    Agreement,
    ClassOffsets,
    DoRA,
    EqualSources,
    FrequencyWeights,
    LayerDecay,
    LogitAdjustment,
    LoRA,
    LossCorrection,
    RowWeights,
    SomeSources,
    Sources,
    TrustedRepeated,
    TunedAdjustment,
)

#: Layers with an adapter in MiniLM's last layer: queries and values, or all linear layers.
ATTENTION, LINEAR = r".*layer\.5\..*\.(query|value)", r".*layer\.5\..*\.(query|key|value|dense)"
#: All linear layers of MiniLM.
EVERY = r".*layer\.\d\..*\.(query|key|value|dense)"
#: Rates for doubtful labels, which high rates learn by heart.
LOW_RATES = (2e-4, 1e-3, 5e-3)
#: Draws of heads, which take a second each.
DRAWS = range(100, 120)
Methods = dict[str, Method]


@dataclass(frozen=True)
class Setting:
    """Methods for one kind of problem, with the tasks and budgets of their comparison.

    Attributes:
        rows: makes a task by its name.
        methods: makes the methods; the others are compared with the first one.
        papers: the bilevel methods among them; the others are simple ways.
        heads: makes the methods that are compared on heads, the limit of many passes.
        held_out: the share of the trusted rows, or of the training rows, that chooses.
        targets: the layers that have an adapter.
        ablations: the methods whose upper level is frozen too; by default ``papers``.
        batch: rows of a lower step, and of a pass.
        passes, rates, upper_rates, seeds, splits, points: as in `compare_methods` and its choice.
    """

    tasks: tuple[str, ...]
    rows: Callable[[str], Task]
    methods: Callable[[], Methods]
    papers: tuple[str, ...]
    heads: Callable[[], Methods] | None = None
    targets: str = ATTENTION
    ablations: tuple[str, ...] | None = None
    passes: Sequence[float] = (1200,)
    batch: int = 8
    held_out: float = 0.2
    rates: Sequence[float] = (6e-4, 2e-3, 6e-3)
    upper_rates: Sequence[float] = (3e-2, 3e-1)
    seeds: Sequence[int] = range(100, 105)
    splits: int = 1
    points: int = 8

    def task(self, name: str, heads: bool = False) -> Task:
        """A task by its name; for heads its features."""
        here = self.rows(name)
        return on_features(here) if heads else here

    def plans(
        self, task: str, heads: bool = False, names: Sequence[str] | None = None
    ) -> dict[float, Plan]:
        """The runs of the comparison at each budget, 0 for heads, of all methods or of ``names``.

        The seeds of heads are draws. ``ablations`` have their frozen forms.
        """
        made = self.heads() if heads and self.heads else self.methods()
        made = {name: x for name, x in made.items() if names is None or name in names}
        frozen = {x: ("frozen",) for x in self.ablations or self.papers if x in made}
        shared: Any = {"metric": METRICS.get(task, "accuracy"), "lower_is_better": False}
        if heads:
            return {0.0: Plan(made, Choice([1.0], [0.6]), DRAWS, ablations=frozen, **shared)}
        choice = Choice(self.rates, self.upper_rates, self.splits, self.held_out, self.points)
        plan = partial(Plan, made, choice, self.seeds, ablations=frozen, **shared)
        return {each: plan(passes=each) for each in self.passes}


def wrong_label_methods(heads: bool = False) -> Methods:
    """Simple ways first; on heads with and without the trusted rows ten times."""
    methods: Methods = {
        "LoRA": LoRA(),
        "trusted rows 10 times": TrustedRepeated(),
        "least trusted loss": KeptRows(),
        "least suspicion, trusted rows 10 times": KeptRows(trusted=False, times=10),
        "loss correction": LossCorrection(),
        "RowWeights": RowWeights(),
    }
    if heads:
        methods["least trusted loss, trusted rows 10 times"] = KeptRows(times=10)
        methods["least suspicion"] = KeptRows(trusted=False)
        methods["trusted rows alone"] = SomeSources()
    return methods


#: An upper step after each lower one leaves a sixteenth of the passes to these.
RARE: dict[str, Any] = {"lower_steps": 4}
#: Upper batches of 64 rows contain most classes.
CLASSES: dict[str, Any] = {"per_device_upper_batch_size": 64}


def rare_class_methods(heads: bool = False) -> Methods:
    """Simple ways first."""
    methods: Methods = {
        "LoRA": LoRA(),
        "logit adjustment": LogitAdjustment(),
        "logit adjustment, τ = 0.5": LogitAdjustment(tau=0.5),
        "logit adjustment, τ = 1.5": LogitAdjustment(tau=1.5),
        "logit adjustment, τ learned": with_arguments(TunedAdjustment(), **CLASSES),
        "ClassOffsets": with_arguments(ClassOffsets(), **CLASSES),
    }
    return methods | {"inverse-frequency weights": FrequencyWeights()} if heads else methods


def source_methods(heads: bool = False) -> Methods:
    """Simple ways first."""
    methods: Methods = {
        "LoRA": LoRA(),
        "trusted rows 10 times": TrustedRepeated(),
        "loss correction": LossCorrection(),
        "loss correction by source": LossCorrection(by_source=True),
        "Sources": Sources(),
    }
    if heads:
        methods["weights by agreement"] = Agreement(log_odds=True)
        methods["each source alike"] = EqualSources()
        methods["trusted rows alone"] = SomeSources()
    return methods


MAGNITUDES: dict[str, Any] = {
    "methods": lambda: {"LoRA": LoRA(), "DoRA": DoRA(), "BiDoRA": BiDoRA()},
    "papers": ("BiDoRA",),
    "targets": EVERY,
    "batch": 16,
    "rates": (3e-4, 1e-3, 3e-3),
    "upper_rates": (1e-3, 1e-2, 3e-1),
    "seeds": range(100, 103),
}
SETTINGS = {
    "wrong labels": Setting(
        ("tweets", "trec"),
        wrong_labels,
        wrong_label_methods,
        ("RowWeights",),
        partial(wrong_label_methods, heads=True),
        passes=(300, 1200),
        held_out=0.4,
        rates=LOW_RATES,
    ),
    "wrong labels, long": Setting(  # at one rate, which the shorter runs need not choose again
        ("trec",),
        wrong_labels,
        wrong_label_methods,
        ("RowWeights",),
        passes=(4800,),
        held_out=0.4,
        rates=(1e-3,),
        upper_rates=(3e-1,),
    ),
    "rare classes": Setting(
        ("newsgroups", "reuters"),
        partial(task, length=24),
        rare_class_methods,
        ("ClassOffsets", "logit adjustment, τ learned"),
        partial(rare_class_methods, heads=True),
        LINEAR,
        ablations=("ClassOffsets",),
        splits=2,
    ),
    "sources": Setting(
        ("questions", "movies"),
        of_sources,
        source_methods,
        ("Sources",),
        partial(source_methods, heads=True),
        held_out=0.4,
        rates=LOW_RATES,
    ),
    "few rows": Setting(
        ("sst2",),
        partial(first_rows, count=100),
        lambda: {
            "LoRA": LoRA(),
            "LoRA, weight decay 0.1": DecayedLoRA(),
            "LoRA, weight decay 1": DecayedLoRA(decay=1.0),
            "LayerDecay, one for all layers": with_arguments(LayerDecay(shared=True), **RARE),
        },
        ("LayerDecay, one for all layers",),
        splits=2,
        targets=LINEAR,
    ),
    "magnitudes, all rows": Setting(
        ("cola",),
        partial(task, length=24, pool=10_000, test=1000),
        passes=(1200,),
        held_out=0.05,
        **MAGNITUDES,
    ),
    "magnitudes, 300 rows": Setting(  # of which MiniLM learns nothing on CoLA
        ("sst2",),
        partial(first_rows, count=300, length=24),
        passes=(300,),
        **MAGNITUDES,
    ),
}
