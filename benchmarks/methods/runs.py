"""The comparison of a setting on a task, run or read from its store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.measure import keep_memory
from benchmarks.methods.settings import SETTINGS
from benchmarks.methods.tasks import score
from hyperopt_peft import BilevelTrainingArguments
from hyperopt_peft.comparison import Choice, Comparison, Runs, compare_methods
from hyperopt_peft.comparison.choice import Axis, Plan
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Run

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


@dataclass(frozen=True)
class OneChoice(Plan):
    """A plan whose seeds share the best rates of a grid, as in the stores of version 0.2.

    Attributes:
        development: the seeds of the runs that chose the rates.
    """

    development: Sequence[int] = ()

    def _parts(self, run: Run) -> list[Run]:
        """The development runs that score ``run``."""
        run = replace(run, split=0, marks=(self.passes,))
        return [replace(run, seed=seed) for seed in self.development]

    def _best(self, store: Store, run: Run, axis: Axis, stopped: bool) -> Run:
        """``run`` at the rate of the best finite mean score."""
        scores = {each: self.curve(store, each)[-1][1] for each in self._grid(run, axis)}
        return max(filter(lambda x: math.isfinite(scores[x]), scores), key=scores.get, default=run)


def stored(setting: str, task: str) -> Comparison | None:
    """The comparison from its store, or None if runs are missing."""
    if not (where := folder(setting, task)).exists():
        return None
    store, plan = Store.of(where), SETTINGS[setting].plan(task)
    if others := {run.seed for run in store.results} - {*plan.seeds}:
        plan = OneChoice(**vars(plan), development=sorted(others))
    if any(store.missing(runs) for runs in plan.stages(store)):  # a stage reads the ones before
        return None
    return Comparison(plan, store)
