"""What breaks an estimator: attention kernels, bfloat16, DDP, FSDP2; each cell from a run.

    torchrun --nproc_per_node 2 -m benchmarks.estimators.breaks FILE METHOD …

writes the columns of two processes; `in_one_process` returns the others.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.estimators.levels import Levels
from benchmarks.estimators.peers import Peer, peers
from hyperopt_peft import NonFiniteError, Problem, ProblemError
from hyperopt_peft.adapters import split_parameters
from hyperopt_peft.hypergradients import Vector, dot, get_estimator
from hyperopt_peft.hypergradients.estimate import check_estimator, open_oracle
from hyperopt_peft.hypergradients.products import Passes
from hyperopt_peft.utils.distributed import gather


class OnBatch(Problem):
    """The loss of ``function(batch)``."""

    def __init__(self, function: Any, variables: Any, **level: Any) -> None:
        self.function = function
        super().__init__(variables, **level)

    def loss(self, batch: Any) -> Tensor:
        """The function's value."""
        result: Tensor = self.function(batch)
        return result


def small_bert(attention: str, *, autocast: bool = False) -> Levels:
    """BiDoRA's two levels over a BERT of two layers, without dropout, float32."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    adapter = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], use_dora=True)
    model = get_peft_model(BertForSequenceClassification(config), adapter).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    parts = split_parameters(model)
    batches = [
        {"input_ids": torch.randint(3, 60, (8, 6)), "labels": torch.randint(2, (8,))}
        for _ in range(2)
    ]

    def loss(batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            result: Tensor = model(**batch).loss
        return result

    directions = parts.directions | parts.rest

    def regularised(batch: Any) -> Tensor:  # so that the solvers have something to solve
        return loss(batch) + 5 * sum(w.square().sum() for w in directions.values())

    rate = torch.optim.AdamW(directions.values(), lr=1e-2, weight_decay=0.0)
    lower = OnBatch(regularised, directions.items(), data=[batches[0]], optimizer=rate)
    return OnBatch(loss, parts.magnitudes.items(), data=[batches[1]]), lower


def network(kind: str, rank: int, processes: int) -> Levels:
    """Two levels over a small network in float64; each process has its share of the batches."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    parameters = dict(model.named_parameters())
    draw = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(12, 6, dtype=torch.float64, generator=draw).chunk(processes)[rank],
            torch.randint(3, (12,), generator=draw).chunk(processes)[rank],
        )
        for _ in range(2)
    ]
    if kind == "DDP":
        model = DistributedDataParallel(model)
    elif kind == "FSDP2":
        fully_shard(model)
        parameters = dict(model.named_parameters())
    w = [pair for pair in parameters.items() if pair[0].startswith("2")]  # f is convex in these
    u = [pair for pair in parameters.items() if pair[0].startswith("0")]

    def loss(batch: Any) -> Tensor:
        logits = model(batch[0])
        return cross_entropy(logits, batch[1]) + logits.square().mean() / 5

    rate = torch.optim.SGD([v for _, v in w], lr=0.1)
    lower = OnBatch(loss, w, data=[batches[0]], optimizer=rate)
    return OnBatch(loss, u, data=[batches[1]]), lower


def found(method: str | Peer, levels: Levels, passes: Passes | None = None) -> Vector | str:
    """The hypergradient, or the short reason why there is none; ``passes`` counts its passes."""
    try:
        if not isinstance(method, str):
            return Vector(gather(x) for x in method(*levels))
        check_estimator(get_estimator(method), *levels)
        oracle = open_oracle(*levels, seed=0)
        oracle.passes = passes or oracle.passes
        return Vector(gather(x) for x in oracle.estimate(get_estimator(method)).hypergradient)
    except (ProblemError, NonFiniteError) as error:
        return refusal(error)
    except (RuntimeError, ArithmeticError, AttributeError, TypeError) as error:
        return textwrap.shorten(f"fails: {error}", 50, placeholder=" …")


def refusal(error: Exception) -> str:
    """The first words of an estimator's refusal."""
    return "refused: " + re.split("[;,(]", str(error).split(": ", 1)[-1])[0]


def _error(result: Vector | str, truth: Vector | str) -> float | str:
    if isinstance(result, str) or isinstance(truth, str):
        return result if isinstance(result, str) else str(truth)
    return (result - truth).norm() / truth.norm()


def in_one_process(methods: Mapping[str, str | Peer]) -> dict[str, dict[str, Any]]:
    """By method: the error of stock attention, of eager attention's value, and bf16's cosine."""
    rows = {}
    for name, method in methods.items():
        eager, stock = (found(method, small_bert(kind)) for kind in ("eager", "sdpa"))
        half = found(method, small_bert("eager", autocast=True))
        cosine: float | str = half if isinstance(half, str) else "–"
        if isinstance(half, Vector) and isinstance(eager, Vector):
            cosine = dot(half, eager) / (half.norm() * eager.norm())
        rows[name] = {"SDPA: error": _error(stock, eager), "bf16: cosine": cosine}
    return rows


def in_two_processes(file: Path, names: Sequence[str]) -> None:
    """By method: the errors of DDP and FSDP2, of one process with the whole batch."""
    dist.init_process_group("gloo")
    rows, others = {}, peers()[0]
    for name in names:
        method = others.get(name, name)
        truth = found(method, network("one", 0, 1))
        rows[name] = {
            f"{kind}: error": _error(found(method, network(kind, dist.get_rank(), 2)), truth)
            for kind in ("DDP", "FSDP2")
        }
    if dist.get_rank() == 0:
        file.write_text(json.dumps(rows))
    gc.collect()  # DDP goes before the group, whose threads it would wait for
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_two_processes(Path(sys.argv[1]), sys.argv[2:])
