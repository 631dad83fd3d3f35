"""Scores of training rows beside the training itself, and a head on the CPU and on the GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from benchmarks.measure import interleaved, rounds, table_of, wait
from benchmarks.speed import llama
from benchmarks.speed.gpu.machine import Machine
from hyperopt_peft import attribute
from hyperopt_peft.attribution.head import HeadTraining
from hyperopt_peft.attribution.scores import (
    HEAD_ESTIMATOR,
    Evaluation,
    Trained,
    parse_estimator,
    scores,
)
from hyperopt_peft.heads import L2, Features, Head

Row = dict[str, Any]
#: The features of a row, for a head; up to three times the width of a model.
WIDTHS = (576, 1152, 2304, 4096)


def attribution(machine: Machine) -> Iterator[Row]:
    """A training of four steps, and the same with the score of each of its rows."""
    model, alone = machine.model(), "training alone"
    size, length = machine.sizes["size"], max(machine.sizes["length"] // 4, 8)
    data = {
        "train_dataset": llama.rows(machine.shape, 4 * size, length),
        "eval_dataset": llama.rows(machine.shape, size, length, seed=1),
    }

    def one(name: str) -> float:
        gc.collect()
        options = llama.options(size, machine.device, max_steps=4, max_grad_norm=0.0, seed=0)
        args = TrainingArguments(**options)
        trainer = Trainer(model, args, data_collator=llama.collated, **data)
        wait(machine.device)
        begin = time.perf_counter()
        trainer.train() if name == alone else attribute(trainer, progress=False)
        wait(machine.device)
        return time.perf_counter() - begin

    yield from table_of(rounds((alone, "training and scores"), one, machine.rounds), alone)


def head(machine: Machine) -> Iterator[Row]:
    """The minimum of a head, and the scores of its rows, in float64 on the CPU and on the GPU."""
    count = 40 if machine.small else 4000
    devices = list(dict.fromkeys(("cpu", machine.device)))
    for width in (8, 16) if machine.small else WIDTHS:
        generator = torch.Generator().manual_seed(width)
        x = torch.randn(count, width, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        rows = Features(x, (x[:, :3] + noise).argmax(1), torch.arange(count))
        on = {name: rows.to(torch.device(name)) for name in devices}
        heads = {name: trained(on[name]) for name in devices}
        row: Row = {"features": width, "rows": count}
        for word, work in (("fit", trained), ("scores", scored)):
            of = on if work is trained else heads
            runs = {name: partial(work, of[name]) for name in devices}
            seconds = interleaved(runs, machine.rounds, machine.device)
            table = {each["run"]: each for each in table_of(seconds, "cpu")}
            row |= {f"{word}, {name}, s": table[name]["s"] for name in devices}
            row[f"{word}, ÷ cpu"] = table[devices[-1]]["÷ cpu"]
        first, last = (scored(heads[name]) for name in ("cpu", devices[-1]))
        yield {**row, "difference of scores": float((first - last).norm() / first.norm())}


def trained(rows: Features) -> HeadTraining:
    """A head of three classes at its minimum, on the device of ``rows``."""
    x = rows.x
    made = Head(x.shape[1], 3, dtype=x.dtype, device=x.device)
    return HeadTraining(made, rows, len(rows.labels), L2)


def scored(training: HeadTraining) -> Tensor:
    """The scores of the training rows, judged by themselves, ``(n,)``."""
    batch = training.features.batch()
    phi = Evaluation(training.weights, training.on_rows.mean([batch]))
    setup = Trained(training, phi, training.level, lambda: batch)
    return scores(setup, parse_estimator(HEAD_ESTIMATOR))[0]
