"""Hypergradients by dot products of `Layers`, plain or distributed in two processes."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, hypergradient
from hyperopt_peft.problems.sources import Sources
from hyperopt_peft.utils.distributed import gather
from tests.support import trainers
from tests.support.weighted_levels import Layers, sequences, weighted

METHODS = ["darts:product=dots", "sama:product=dots", "fastmix"]
RUNS = {"float": {}, "fastmix": {"hypergradient": "fastmix"}, "half": {"bf16": True}}


def estimates(kind: str, count: int = 1, rank: int = 0) -> dict[str, Any]:
    """Each method's hypergradient, where each process has its share of both batches."""
    model = Layers()
    called: Any = model
    if kind == "ddp":
        called = DistributedDataParallel(model)
    elif kind != "one":
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
        options = {"mp_policy": half} if kind == "fsdp-half" else {}
        for module in (model.second, model):
            fully_shard(module, **options)
    upper, lower = weighted("source", called, 3)
    lower.optimizer = torch.optim.AdamW(lower.variables, lr=0.1, eps=1e-3)
    batches = [
        {name: column.chunk(count)[rank] for name, column in sequences(rows, seed).items()}
        for rows, seed in ((8, 2), (12, 1))
    ]
    return {
        method: hypergradient(upper, lower, method, upper_batch=batches[0], lower_batch=batches[1])[
            0
        ]
        for method in METHODS
    }


def learnt(trainer: Any) -> Tensor:
    return torch.cat([x.detach().flatten() for x in trainer.upper.variables])


def trained(folder: Path, product: str, *, method: Any = Sources, **options: Any) -> Any:
    """A trainer after a run over a causal model, with Adam above."""
    model = options.pop("model", None) or trainers.peft_model("causal", dropout=0.1, dora=False)
    torch.manual_seed(7)
    dtype = options.pop("dtype", torch.float32)
    settings = {"max_steps": 4, "lower_steps": 2, "hypergradient": product, "learning_rate": 1e-2}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"upper_learning_rate": 0.1, "retrain": "none", **trainers.QUIET}
    args = BilevelTrainingArguments(str(folder), **{**settings, **options})
    trainers.shard_on_cpus()
    trainer = BilevelTrainer(
        model.to(dtype),
        args,
        method=method(),
        train_dataset=trainers.data("causal").add_column("source", [k % 2 for k in range(24)]),
        upper_dataset=trainers.data("causal", 8, seed=5),
    )
    assert trainer.is_fsdp_enabled == ("ACCELERATE_USE_FSDP" in os.environ)
    trainer.start = learnt(trainer)
    trainer.train()
    return trainer


def train(folder: Path, batch: int, **options: Any) -> dict[str, Any]:
    """A run with dot products over a Llama in float64: the weights, and the adapter, at its end."""
    options |= {"dtype": torch.float64, "per_device_train_batch_size": batch}
    options["model"] = trainers.peft_model("causal", dropout=0.0, dora=False)
    trainer = trained(folder, "darts:product=dots", **options)
    values = {name: gather(value) for name, value in trainers.values(trainer.model).items()}
    return {"logits": learnt(trainer), **values}


def work(folder: Path, *kinds: str) -> dict[str, Any]:
    if "ACCELERATE_USE_FSDP" in os.environ:
        return {name: train(folder / name, 2, **options) for name, options in RUNS.items()}
    dist.init_process_group("gloo")
    place = dist.get_world_size(), dist.get_rank()
    return {kind: estimates(kind, *place) for kind in kinds}
