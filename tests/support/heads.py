"""Features whose classes are linear in them, up to noise, heads on these, and a Trainer."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hyperopt_peft.attribution.head import HeadTraining
from hyperopt_peft.heads import Features, Head
from tests.support.trainers import QUIET, data, peft_model

L2 = 0.1


def features(count: int, seed: int = 0, *, classes: int = 3, noise: float = 1.0) -> Features:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=source, dtype=torch.float64)
    errors = torch.randn(count, classes, generator=source, dtype=torch.float64)
    labels = (x[:, :classes] + noise * errors).argmax(1)
    return Features(x, labels, torch.arange(count))


def fitted(rows: Features, classes: int = 3) -> HeadTraining:
    head = Head(rows.x.shape[1], classes, dtype=torch.float64)
    return HeadTraining(head, rows, int(rows.row.max()) + 1, L2)


def trainer(folder: Path, kind: str = "classes", **options: Any) -> Trainer:
    args = TrainingArguments(str(folder), max_steps=30, learning_rate=0.1, **QUIET)
    sets = {"train_dataset": data(kind, 14), "eval_dataset": data(kind, 7, seed=1)}
    return Trainer(peft_model(kind, dora=False), args, **sets | options)
