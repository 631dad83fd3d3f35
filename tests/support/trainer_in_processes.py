"""BiDoRA in each of two processes."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from hyperopt_peft import NonFiniteError, ProblemError
from hyperopt_peft.utils.distributed import gather
from tests.support import trainers as models

OPTIONS = {"max_steps": 6, "upper_fraction": 1 / 3, "lower_steps": 2}
RUNS = {
    "darts": {"hypergradient": "darts:scheme=forward", "upper_prior": 10.0},
    "direct": {"hypergradient": "direct", "gamma": 0.1, "rows": 23, "upper_fraction": 0.3},
    "cg": {"hypergradient": "cg:steps=3", "gradient_accumulation_steps": 2},
    "minres": {"hypergradient": "minres:steps=3,product=difference", "sized": True},
    "f2sa": {"hypergradient": "f2sa:inner_steps=3", "gradient_accumulation_steps": 2},
    "retrain": {
        "retrain": "scratch",
        "retrain_arguments": {"max_steps": 3},
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",  # an evaluation is the last that happens before the retraining
        "eval_steps": 2,
    },
    "dora": {"method": "dora"},
}
SHARDED = ["darts", "minres", "f2sa", "retrain", "dora"]
# With this each process shards what it has; in the shipped configuration it is the first one's.
OWN_WEIGHTS = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": "BertLayer",
        "cpu_ram_efficient_loading": False,
    },
}
REFUSED = {
    "cg": {"hypergradient": "cg"},
    "gamma": {"gamma": 0.1},
    "bf16": {"bf16": True},
    "version": {"fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False}},
    "state": {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
}


def make(
    folder: Path,
    batch: int = 4,
    *,
    rows: int = 24,
    sized: bool = False,
    method: str = "bidora",
    **options: Any,
) -> Any:
    """A trainer of 16 lower and 8 or 7 upper rows in float64, without dropout.

    An upper batch is all of its rows, or ``batch`` if ``sized``. The second process begins with
    other values, which do not count.
    """
    settings = {**OPTIONS, "per_device_train_batch_size": batch, **options}
    settings["per_device_upper_batch_size"] = batch if sized else None
    model = models.peft_model(dropout=0.0).double()
    if dist.is_initialized() and dist.get_rank() == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.requires_grad)
    options = {"eval_dataset": models.data(rows=8, seed=5)}
    settings |= {"model": model, "rows": rows, "options": options, "method": method}
    return models.trainer(folder, **settings)


def train(folder: Path, batch: Any, resume: Any = None, **options: Any) -> tuple[Any, ...]:
    """The logs of both phases, and the parameters at the end."""
    trainer = make(folder, batch, **options)
    trainer.train(resume)
    trainer.save_model(str(folder / "adapter"))
    logs = list(trainer.state.log_history)
    if getattr(trainer, "retrainer", None) is not None:
        logs += trainer.retrainer.state.log_history
    for log in logs:
        log.pop("seconds", None)
    return logs, {n: gather(value) for n, value in models.values(trainer.model).items()}


def refusal(folder: Path, **options: Any) -> Any:
    """What a trainer says that cannot be made, or cannot begin."""
    try:
        make(folder, 2, **options).train()
    except ProblemError as error:
        return str(error)


def stopped(folder: Path, batch: Any) -> Any:
    """What a process says where another one's loss is NaN at the fourth step."""
    trainer = make(folder, batch)
    loss = trainer.lower.task_loss

    def poisoned(inputs: Any) -> Any:
        here = dist.get_rank() == 1 and trainer.state.global_step == 3
        return loss(inputs) * (torch.nan if here else 1)

    trainer.lower.task_loss = poisoned
    try:
        trainer.train()
    except NonFiniteError as error:
        return str(error)


def work(folder: Path) -> dict[str, Any]:
    sharded = "ACCELERATE_USE_FSDP" in os.environ
    runs = SHARDED if sharded else RUNS
    results = {}
    for name in runs:
        options = RUNS[name] | (OWN_WEIGHTS if sharded and name == "minres" else {})
        results[name] = train(folder / name, 2, **options)
    saving = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    saving |= RUNS["retrain"] | {"retrain": "none"}
    results["saved"] = train(folder / "saved", 2, **saving)
    last = folder / "saved" / "checkpoint-4"
    results["resumed"] = train(folder / "saved", 2, str(last), **saving)
    results["stopped"] = stopped(folder / "stopped", 2)
    if sharded:
        results["refused"] = {n: refusal(folder / n, **options) for n, options in REFUSED.items()}
    return results
