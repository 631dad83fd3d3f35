"""Losses with masks from NumPy, as SpecAugment has, or from a generator of their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hyperopt_peft import bilevel
from hyperopt_peft.core.task_level import TaskLevel
from tests.support.class_weights import rows
from tests.support.networks import differences
from tests.support.resume import require_same_end
from tests.support.trainers import QUIET, values

SETTINGS = {**QUIET, "max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
SETTINGS |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "seed": 3}


def speech_model() -> Any:
    """A Wav2Vec2 with LoRA and with masks from NumPy (SpecAugment), equal at every call."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        conv_dim=(8, 8),
        conv_kernel=(5, 3),
        conv_stride=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        num_labels=3,
        initializer_range=0.5,
        mask_time_prob=0.5,
        mask_time_length=2,
        mask_time_min_masks=2,
    )
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(Wav2Vec2ForSequenceClassification(config), adapter)


def speech_rows(count: int, seed: int = 0) -> Dataset:
    """Recordings of noise, each with a class."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 120, generator=generator).tolist()
    labels = torch.randint(0, 3, (count,), generator=generator).tolist()
    return Dataset.from_dict({"input_values": noise, "labels": labels})


class MeanOfRows(Trainer):
    """Says of its loss what the trainer otherwise measures."""

    loss_is_scaled_for_ga = False


def of_parameters(name: str) -> Any:
    """A level of the parameters with ``name`` in theirs, with the Trainer's loss."""

    def level(trainer: Any) -> TaskLevel:
        named = [(n, p) for n, p in trainer.model.named_parameters() if name in n]
        return TaskLevel(trainer.model, named, task_loss=trainer.task_loss, name=name)

    return level


def two_levels(folder: Path, callbacks: Any = (), *, parent: Any = Trainer, **settings: Any) -> Any:
    """LoRA's A below and B above, of whose batch there are four pieces."""
    make = bilevel(parent)
    more = {"upper_learning_rate": 1e-2, "hypergradient": "darts", **settings}
    return make(
        speech_model(),
        lower=of_parameters("lora_A"),
        upper=of_parameters("lora_B"),
        args=make.Arguments(str(folder), **SETTINGS | more),
        train_dataset=speech_rows(16),
        upper_dataset=speech_rows(8, seed=1),
        callbacks=list(callbacks),
    )


def logs(trainer: Any) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "lower_grad_norm", "upper_loss", "upper_grad_norm")
    return [{k: x[k] for k in names if k in x} for x in trainer.state.log_history if "loss" in x]


def test_one_level_is_the_trainer(tmp_path: Path) -> None:
    """Bit for bit: what is measured of the loss draws no number.

    With several micro-batches Transformers trains the sum of their losses here.
    """
    ends, settings = [], {**SETTINGS, "gradient_accumulation_steps": 1}
    for parent in (Trainer, bilevel(Trainer)):
        args = getattr(parent, "Arguments", TrainingArguments)(str(tmp_path), **settings)
        model = speech_model()
        trainer = parent(model=model, args=args, train_dataset=speech_rows(16))
        trainer.train()
        losses = [(x["loss"], x["grad_norm"]) for x in logs(trainer)]
        ends.append((values(model), losses, np.random.get_state()[1].tolist()))
    assert not differences(*ends)


def test_losses_and_gradients_are_those_of_a_mean(tmp_path: Path) -> None:
    """Those of a class that says so, with several pieces at both levels."""
    ends = []
    for parent in (Trainer, MeanOfRows):
        made = two_levels(tmp_path, parent=parent)
        made.train()
        ends.append(logs(made))
    for ours, expected in zip(*ends, strict=True):
        assert ours == pytest.approx(expected, rel=1e-3)


def test_an_upper_level_that_stays_changes_nothing_below(tmp_path: Path) -> None:
    """The lower level's masks depend neither on the estimator nor on the upper level's pieces."""
    ends = []
    for settings in ({"hypergradient": "direct", "lower_steps": 4}, {"hypergradient": "darts"}):
        made = two_levels(tmp_path, upper_learning_rate=0.0, **settings)
        made.train()
        ends.append((values(made.model), np.random.get_state()[1].tolist()))
    assert not differences(*ends)


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    def make(folder: Path, callbacks: Any = (), **settings: Any) -> Any:
        saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "logging_steps": 2}
        return two_levels(folder, callbacks, **saved)

    require_same_end(tmp_path, (3,), (7,), make=make)


@pytest.mark.parametrize("reads", [False, True])
def test_a_loss_with_a_generator_of_its_own_is_not_taken_for_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reads: bool
) -> None:
    """Neither one that ignores the count of labels, nor a sum that is divided by it."""
    random = np.random.default_rng(0)

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        """Log 3, since the model knows next to nothing, times a half to three halves."""
        total = cross_entropy(1e-3 * outputs, labels, reduction="sum")
        return total / (num_items_in_batch if reads else len(labels)) * (0.5 + random.random())

    class Linear(nn.Linear):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(x)

    make, rate = bilevel(Trainer), {"learning_rate": 0.0, "upper_learning_rate": 0.0}
    made = make(
        Linear(6, 3),
        lower=of_parameters("weight"),
        upper=of_parameters("bias"),
        args=make.Arguments(str(tmp_path), **SETTINGS | rate, hypergradient="direct"),
        train_dataset=rows(24, 0),
        upper_dataset=rows(8, 1),
        compute_loss_func=loss,
    )
    made.train()
    for log in logs(made):
        assert 0.5 <= log["loss"] / math.log(3) <= 1.5
        assert 0.5 <= log["upper_loss"] / math.log(3) <= 1.5
    assert "generator of its own" in caplog.text
