"""The comparison of a setting on a task, run or read from its store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.measure import keep_memory
from benchmarks.methods.settings import SETTINGS
from benchmarks.methods.tasks import score
from hyperopt_peft import BilevelTrainingArguments
from hyperopt_peft.comparison import Comparison, compare_methods
from hyperopt_peft.comparison.store import SETTINGS as HEAD
from hyperopt_peft.comparison.store import Store

RESULTS = Path(__file__).parents[1] / "results/methods"
#: Arguments of a comparison that takes a minute.
QUICK: dict[str, Any] = {"rates": (2e-2,), "upper_rates": (1e-2,), "seeds": (0, 1), "passes": 60}


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
    here, plan = chosen.rows(task), chosen.plan
    arguments: dict[str, Any] = {"remove_unused_columns": False, "report_to": "none"}
    arguments |= {"per_device_train_batch_size": chosen.batch, "per_device_eval_batch_size": 100}
    settings = {"rates": plan.rates, "upper_rates": plan.upper_rates, "seeds": plan.seeds}
    settings |= {"development": plan.development, "passes": chosen.passes}
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
        metric=here.metric,
        ablations=plan.ablations,
        held_out=chosen.held_out,
        frozen_dropout=chosen.dropout,
        folder=where,
        data_collator=here.collate,
        compute_metrics=score,
        **{**settings, **options},
    )


def stored(setting: str, task: str) -> Comparison | None:
    """The comparison from its store, or None if runs are missing."""
    path = folder(setting, task) / "runs.jsonl"
    if not path.exists():
        return None
    with path.open() as file:
        settings = json.loads(next(file))[HEAD]
    plan, store = SETTINGS[setting].plan, Store(path.parent, settings)
    if any(store.missing(runs) for runs in plan.stages(store)):  # a stage reads the ones before
        return None
    return Comparison(plan, store, settings["metric"], settings["passes"])
