"""The comparisons of a setting on a task, run or read from their store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.measure import keep_memory
from benchmarks.methods.settings import SETTINGS
from benchmarks.methods.tasks import score
from hyperopt_peft import BilevelTrainingArguments
from hyperopt_peft.comparison import Choice, Comparison, Runs, compare_heads, compare_methods
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.method import row_losses

RESULTS = Path(__file__).parents[1] / "results/kinds"
#: Arguments of a comparison that takes a minute.
QUICK: dict[str, Any] = {"choice": Choice([2e-2], [1e-2]), "seeds": (0, 1), "budgets": [50, 70]}


def folder(setting: str, task: str, heads: bool = False) -> Path:
    """The folder of the runs of a setting on a task, of adapters or of heads."""
    name = f"{task}-heads" if heads else task
    return RESULTS / setting.replace(", ", "-").replace(" ", "-") / name


def compared(
    setting: str,
    task: str,
    runs: Runs,
    *,
    heads: bool = False,
    names: Sequence[str] | None = None,
    **options: Any,
) -> dict[float, Comparison]:
    """Run the comparisons of a setting on a task, by budget, of all methods or of ``names``.

    ``options`` are arguments of `compare_methods` that replace the setting's; ``budgets`` replaces
    its budgets.
    """
    from text_data import quiet

    quiet()
    torch.set_num_threads(1)
    keep_memory()
    torch.manual_seed(0)
    chosen = SETTINGS[setting]
    here, plans = chosen.task(task, heads), chosen.plans(task, heads, names)
    plan = next(iter(plans.values()))
    arguments: dict[str, Any] = {"report_to": "none", "remove_unused_columns": heads}
    arguments |= {"per_device_train_batch_size": chosen.batch, "per_device_eval_batch_size": 100}
    more: dict[str, Any] = {"seeds": plan.seeds, "metric": plan.metric, "ablations": plan.ablations}
    args = BilevelTrainingArguments("unused", use_cpu=True, warmup_steps=0.1, **arguments)
    more |= {"train_dataset": here.train, "upper_dataset": here.trusted, "test_dataset": here.test}
    more |= {"data_collator": here.collate, "compute_metrics": score, "runs": runs}
    more["row_losses"] = row_losses  # the loss of `Encoder` is the mean over labels
    if heads:
        return {0.0: compare_heads(plan.methods, here.base_model, args, **more)}
    lora = {"target_modules": chosen.targets, "modules_to_save": ["classifier"]}
    adapter = LoraConfig(r=8, lora_alpha=16, **lora)
    compare = partial(compare_methods, plan.methods, here.base_model, adapter, args)
    budgets = options.pop("budgets", chosen.passes)
    more = {**more, "choice": plan.choice, **options}
    return {passes: compare(passes=passes, **more) for passes in budgets}


def stored(setting: str, task: str, heads: bool = False) -> dict[float, Comparison]:
    """By budget, the comparison of the methods with all runs; none if the first one lacks some."""
    if not (where := folder(setting, task, heads)).exists():
        return {}
    store, chosen = Store.of(where), SETTINGS[setting]
    names = [*next(iter(chosen.plans(task, heads).values())).methods]
    done = []
    for name in names:
        plans = chosen.plans(task, heads, [name]).values()
        # A stage reads the ones before.
        if not any(store.missing(runs) for plan in plans for runs in plan.stages(store)):
            done.append(name)
    if done[:1] != names[:1]:
        return {}
    plans = chosen.plans(task, heads, done).items()
    return {passes: Comparison(plan, store) for passes, plan in plans}
