"""Hypergradients by dot products of `Layers`, plain or distributed; run as one of two processes."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hyperopt_peft import hypergradient
from hyperopt_peft.problems.data_sources import Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import HeldOut
from tests.support import two_processes
from tests.support.weighted_levels import Layers, sequences

METHODS = ["darts:product=dots", "sama:product=dots", "fastmix"]


def estimates(kind: str, count: int = 1, rank: int = 0) -> dict[str, Any]:
    """Each method's hypergradient, where each process has its share of both batches."""
    model = Layers()
    weights = SourceWeights({"a": 4, "b": 5, "c": 3}).double()
    torch.nn.init.normal_(weights.logits)
    called: Any = model
    if kind == "ddp":
        called = DistributedDataParallel(model)
    elif kind != "one":
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
        options = {"mp_policy": half} if kind == "fsdp-half" else {}
        for module in (model.second, model):
            fully_shard(module, **options)
    upper, lower = HeldOut(called, weights), Mixture(called, weights)
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


def work(folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    place = dist.get_world_size(), dist.get_rank()
    return {kind: estimates(kind, *place) for kind in sys.argv[2:]}


if __name__ == "__main__":
    two_processes.main(work)
