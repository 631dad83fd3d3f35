"""A `BiDoRATrainer` in each of two processes; run as a script by one of them."""

import sys
from pathlib import Path

import torch
from torch import distributed as dist

from hyperopt_peft import NonFiniteError
from trainer import models

OPTIONS = {"max_steps": 6, "upper_fraction": 1 / 3, "lower_steps": 2}
RUNS = {
    "darts": {"hypergradient": "darts:sides=1"},
    "direct": {"hypergradient": "direct", "gamma": 0.1, "magnitude_decay": 0.1},
    "cg": {"hypergradient": "cg:steps=3", "gradient_accumulation_steps": 2},
    "minres": {"hypergradient": "minres:steps=3,product=difference"},
    "neumann": {"hypergradient": "neumann:terms=3,power_steps=3", "lower_steps": 1},
    "retrain": {"retrain": "scratch", "retrain_steps": 3, "gradient_accumulation_steps": 2},
    "dora": {"method": "dora"},
}


def make(folder, batch=4, **options):
    """A trainer of 16 lower and 8 upper rows in float64, without dropout."""
    model = models.peft_model(dropout=0.0).double()
    settings = {**OPTIONS, "per_device_train_batch_size": batch, **options}
    return models.trainer(folder, dropout=0.0, model=model, **settings)


def train(folder, batch, resume=None, **options):
    """The logs of both phases, and the parameters at the end."""
    trainer = make(folder, batch, **options)
    trainer.train(resume)
    logs = list(trainer.state.log_history)
    if trainer.retrainer is not None:
        logs += trainer.retrainer.state.log_history
    return logs, models.values(trainer.model)


def stopped(folder, batch):
    """What a process says where another one's loss is NaN at the fourth step."""
    trainer = make(folder, batch)
    loss = trainer.lower.task_loss

    def poisoned(inputs):
        here = dist.get_rank() == 1 and trainer.state.global_step == 3
        return loss(inputs) * (torch.nan if here else 1)

    trainer.lower.task_loss = poisoned
    try:
        trainer.train()
    except NonFiniteError as error:
        return str(error)


def main(folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    results = {name: train(folder / name, 2, **options) for name, options in RUNS.items()}
    saving = {"save_strategy": "steps", "save_steps": 2, **RUNS["cg"]}
    results["saved"] = train(folder / "saved", 2, **saving)
    last = folder / "saved" / "checkpoint-4"
    results["resumed"] = train(folder / "saved", 2, str(last), **saving)
    results["stopped"] = stopped(folder / "stopped", 2)
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
