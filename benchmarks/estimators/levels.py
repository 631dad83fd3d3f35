"""The problems of `comparison`, at the points where hypergradients are computed.

A, B and C are at the minimum of their lower level, in float64. "BiDoRA" is MiniLM on real tweets:
the upper level has the magnitudes, the lower level A, B and head. Its lower loss has a term
½λ‖w − w0‖², since without that a small training set has no minimum, and it is trained until the
gradient is small.
"""

from __future__ import annotations

from typing import Any

import torch
from text_data import model_path, tweets
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorWithPadding

from benchmarks.minilm import minilm
from hyperopt_peft import Problem
from hyperopt_peft.adapters import split_parameters
from hyperopt_peft.engine import minimize
from hyperopt_peft.problems.bidora import Direction, Magnitude
from hyperopt_peft.problems.textbook import hypercleaning, logistic, ridge

Levels = tuple[Problem, Problem]

METHODS = [
    "direct",
    "darts:xi=1.0",
    "darts:xi=lr",
    "sama",
    "unrolled:steps=10",
    "neumann:terms=20",
    "cg:steps=10",
    "cg:steps=10,product=difference",
    "minres:steps=10",
    "nystrom:rank=10,steps=0",
    "nystrom:rank=10,steps=10",
    "warm",
    "f2sa",
    "exact",
]


def small_problems() -> dict[str, Levels]:
    """A: penalties of a logistic regression; B: weights of noisy images; C: ridge regression."""
    problems: dict[str, Levels] = {
        "A": logistic.breast_cancer(),
        "B": hypercleaning.digits(),
        "C": ridge.diabetes(),
    }
    for _, lower in problems.values():
        minimize(lower)
    return problems


class Proximal(Direction):
    """BiDoRA's lower level with ½λ‖w − w0‖²."""

    def __init__(self, model: Any, strength: float, **level: Any) -> None:
        super().__init__(model, **level)
        self.strength, self.start = strength, [w.detach().clone() for w in self.variables]

    def loss(self, batch: Any) -> Tensor:
        """The task loss plus ½λ‖w − w0‖²."""
        moved = zip(self.variables, self.start, strict=True)
        distance = sum((w - w0).square().sum() for w, w0 in moved)
        task: Tensor = self.task_loss(batch)
        return task + self.strength / 2 * distance


def encoder_problem(steps: int, strength: float = 0.2) -> tuple[Levels, float]:
    """BiDoRA on MiniLM and two batches of tweets after ``steps`` lower steps, and the last ‖∂f/∂w‖.

    The model is in eval mode, without dropout; fidelity.py is about dropout.
    """
    rows = tweets()
    for size in ({"test_size": 64}, {"train_size": 64}):
        parts = rows.train_test_split(**size, seed=0, stratify_by_column="label")
        rows = parts["train"]
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    items = [
        {**tokenizer(text, truncation=True, max_length=16), "labels": label}
        for text, label in zip(rows["text"][:16], rows["label"][:16], strict=True)
    ]
    collate = DataCollatorWithPadding(tokenizer)
    below, above = (dict(collate(part)) for part in (items[:8], items[8:]))
    model = minilm("fast full", rank=4, targets=["query", "value"]).eval()
    parts = split_parameters(model)
    w, u = [*parts.directions.values(), *parts.rest.values()], list(parts.magnitudes.values())
    rate = torch.optim.AdamW(w, lr=1e-3, weight_decay=0.0)
    lower = Proximal(model, strength, data=[below], optimizer=rate)
    upper = Magnitude(model, data=[above], optimizer=torch.optim.AdamW(u, lr=1e-3))
    norm = float("nan")
    for _ in range(steps):
        norm = lower.step(lower.gradient(below, lower.variables).gradient)
    return (upper, lower), norm
