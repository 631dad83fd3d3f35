"""The comparison of a setting on a task, run or read from its store."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.measure import keep_memory
from benchmarks.methods.settings import SETTINGS
from benchmarks.methods.tasks import score
from hyperopt_peft import BilevelTrainingArguments
from hyperopt_peft.comparison import Choice, Comparison, Runs, compare_methods
from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Kind, Run

RESULTS = Path(__file__).parents[1] / "results/methods"
#: Arguments of a comparison that takes a minute.
QUICK: dict[str, Any] = {"choice": Choice([2e-2], [1e-2]), "seeds": (0, 1), "passes": 60}
#: What a plan has of the arguments of `compare_methods`.
PLANNED = ("choice", "seeds", "metric", "passes", "ablations")


def folder(setting: str, task: str) -> Path:
    """The folder of the runs of a setting on a task."""
    return RESULTS / setting.replace(", ", "-").replace(" ", "-") / task


def compared(setting: str, task: str, where: Path | None, **options: Any) -> Comparison:
    """Run the comparison of a setting on a task, stored in the folder ``where``.

    ``options`` are arguments of `compare_methods` that replace the setting's.
    """
    from text_data import quiet

    quiet()
    torch.set_num_threads(1)
    keep_memory()
    torch.manual_seed(0)
    chosen = SETTINGS[setting]
    here, plan = chosen.rows(task), chosen.plan(task)
    arguments: dict[str, Any] = {"remove_unused_columns": False, "report_to": "none"}
    arguments |= {"per_device_train_batch_size": chosen.batch, "per_device_eval_batch_size": 100}
    return compare_methods(
        plan.methods,
        here.base_model,
        LoraConfig(
            r=8, lora_alpha=16, target_modules=chosen.targets, modules_to_save=["classifier"]
        ),
        BilevelTrainingArguments("unused", use_cpu=True, warmup_steps=0.1, **arguments),
        train_dataset=here.train,
        upper_dataset=here.trusted,
        test_dataset=here.test,
        frozen_dropout=chosen.dropout,
        data_collator=here.collate,
        compute_metrics=score,
        **{name: getattr(plan, name) for name in PLANNED} | {"runs": Runs(where)} | options,
    )


class OneChoice(Plan):
    """A plan whose seeds share rates, chosen with other seeds, as in the stores of version 0.2."""

    def chosen(self, store: Store, name: str, kind: Kind, seed: int, stopped: bool = False) -> Any:
        """The reported run of a seed, None if there is none."""
        wanted = name, kind, seed, None
        found = (x for x in store.results if (x.method, x.kind, x.seed, x.split) == wanted)
        return next(found, None)

    def stages(self, store: Store) -> Iterator[list[Run]]:
        """The reported runs."""
        pairs = self.candidates()
        yield [self.chosen(store, *each, seed) for each in pairs for seed in self.seeds]

    def at_every_rate(self, store: Store, name: str, kind: Kind) -> list[tuple[Run, float]]:
        """A run at each pair of rates that was tried, and the mean held-out score of its seeds."""
        scores: dict[Run, list[float]] = {}
        for run, result in store.results.items():
            if (run.method, run.kind, run.split) == (name, kind, 0):
                score = result["metrics"].get(f"eval_{self.metric}", math.nan)
                scores.setdefault(replace(run, seed=0), []).append(score)
        return [(run, fmean(each)) for run, each in scores.items()]


def stored(setting: str, task: str) -> Comparison | None:
    """The comparison from its store, or None if runs are missing."""
    if not (where := folder(setting, task)).exists():
        return None
    store, plan = Store.of(where), SETTINGS[setting].plan(task)
    if {run.seed for run in store.results} - {*plan.seeds}:
        plan = OneChoice(**vars(plan))
    if any(store.missing(runs) for runs in plan.stages(store)):  # a stage reads the ones before
        return None
    return Comparison(plan, store)
