"""The calls of `compare_methods` that are the study, one for each task and budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.measure import keep_memory
from hyperopt_peft import BiDoRA, BilevelTrainingArguments, Method
from hyperopt_peft.comparison import Comparison, compare_methods
from hyperopt_peft.comparison.choice import RATES, UPPER_RATES, Plan
from hyperopt_peft.comparison.store import SETTINGS, Store
from hyperopt_peft.problems import DoRA, LoRA

RESULTS = Path(__file__).parents[1] / "results/study"
TASKS = ("trec", "sst2", "tweets", "tags")
#: Training rows x passes, in the order of their runs.
CELLS = ("300x300", "100x300", "300x100", "300x900", "100x900", "100x100")
SEEDS, DEVELOPMENT = range(5), range(100, 103)
#: Arguments of a study of a minute.
QUICK: dict[str, Any] = {
    "sizes": {"pool": 80, "test": 40},
    "rates": (2e-2,),
    "upper_rates": (1e-2,),
    "seeds": (0, 1),
    "progress": False,
}


def methods() -> dict[str, Method]:
    """The methods that are compared, by name."""
    published = BiDoRA.published()
    # An upper step after each lower one, on a batch of the same size.
    batches = {"lower_steps": 1, "per_device_upper_batch_size": 8}
    published.__dict__["defaults"] = {**published.defaults, **batches}
    return {"LoRA": LoRA(), "DoRA": DoRA(), "BiDoRA": BiDoRA(), "BiDoRA, published": published}


def folder(name: str, cell: str) -> Path:
    """Where the runs of a task and a cell are."""
    return RESULTS / f"{name}-{cell.replace('x', '-')}"


def compared(
    name: str, cell: str, where: Path | None = None, sizes: Any = None, **options: Any
) -> Comparison:
    """The comparison of a task and a cell, kept in the folder ``where``.

    Args:
        sizes: those of `task`.
        options: arguments of `compare_methods` that differ.
    """
    from text_data import quiet

    from benchmarks.methods.tasks import collate, score, task

    torch.set_num_threads(1)
    keep_memory()
    quiet()
    here, (rows, passes) = task(name, **(sizes or {})), map(int, cell.split("x"))
    arguments: dict[str, Any] = {"remove_unused_columns": False, "report_to": "none"}
    arguments |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 100}
    settings = {"seeds": SEEDS, "development": DEVELOPMENT, **options}
    return compare_methods(
        methods(),
        here.base_model,
        LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=r".*layer\.5\..*\.(query|value)",
            modules_to_save=["classifier"],
        ),
        BilevelTrainingArguments("unused", use_cpu=True, warmup_steps=0.1, **arguments),
        passes=passes,
        metric=here.metric,
        train_dataset=here.train.select(range(rows)),
        test_dataset=here.test,
        frozen_dropout=False,
        folder=where,
        data_collator=collate,
        compute_metrics=score,
        **settings,
    )


def stored(name: str, cell: str) -> Comparison | None:
    """The comparison of a task and a cell from its store alone; None before all runs are there."""
    path = folder(name, cell) / "runs.jsonl"
    if not path.exists():
        return None
    with path.open() as file:
        settings = json.loads(next(file))[SETTINGS]
    plan = Plan(methods(), RATES, UPPER_RATES, DEVELOPMENT, SEEDS, lower_is_better=False)
    store = Store(path.parent, settings)
    for stage in (lambda _: plan.first_rates(), plan.next_rates, plan.reported):
        if store.missing(stage(store)):  # on whose results the next stage depends
            return None
    return Comparison(plan, store, settings["metric"], settings["passes"])
