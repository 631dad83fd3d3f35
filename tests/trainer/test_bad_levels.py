"""What a `BilevelTrainer` refuses to be made of: settings, levels, data and optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from hyperopt_peft import BilevelTrainer, Problem, ProblemError
from hyperopt_peft.problems.bidora import Direction
from tests.support.refusals import APART, cases, levels, plain, refuses, stream
from tests.support.trainers import arguments, data, peft_model


class Unsized(torch.utils.data.Dataset):
    """Examples by index, without a length."""

    def __getitem__(self, index: Any) -> Any:
        return data()[index]


def groups(model: Any, *rates: Any) -> Any:
    parts = levels(model).values()
    return [{"params": x.variables, "lr": rate} for x, rate in zip(parts, rates, strict=True)]


def adamw(model: Any) -> Any:
    return torch.optim.AdamW(groups(model, 1e-3, 1e-3))


def on_two_gpus(folder: Path) -> Any:
    args = arguments(folder)
    args._n_gpu = 2  # as on a machine with two, without torchrun
    return args


class Half(Problem):
    """Owns what another level owns too."""


PLAIN = {
    "arguments of the Trainer": (
        lambda m, f: {"args": TrainingArguments(str(f), report_to="none")},
        "args",
    ),
    "arguments as a dict": (lambda m, f: {"args": {"lower_steps": 2}}, "args"),
    "threads of DataParallel": (lambda m, f: {"args": on_two_gpus(f)}, "n_gpu"),
    "batch size by trial": (
        lambda m, f: {"args": arguments(f, auto_find_batch_size=True)},
        "auto_find_batch_size",
    ),
    "model_init": (lambda m, f: {"model_init": peft_model}, "model_init"),
    "compute_loss_func": (
        lambda m, f: {"compute_loss_func": lambda *_, **__: 0},
        "compute_loss_func",
    ),
    "label smoothing": (
        lambda m, f: {"args": arguments(f, label_smoothing_factor=0.1)},
        "label_smoothing_factor",
    ),
    "compilation": (lambda m, f: {"args": arguments(f, torch_compile=True)}, "torch_compile"),
    "a module as level": (lambda m, f: {"upper": m}, "a level must be a Problem, got PeftModel"),
    "a level without super().__init__": (
        lambda m, f: {"upper": Half.__new__(Half)},
        "Half: has no variables",
    ),
    "data of a level": (lambda m, f: levels(m, data=[{}]), "Direction"),
    "optimizer of a level": (
        lambda m, f: levels(m, optimizer=torch.optim.SGD(Direction(m).variables, 0.1)),
        "Direction",
    ),
    "norm limit of a level": (lambda m, f: levels(m, max_grad_norm=1.0), "max_grad_norm"),
    "a tensor of both levels": (
        lambda m, f: {"upper": Half(Direction(m).variables[:1], name="Half")},
        "Direction.*Half|Half.*Direction",
    ),
    "upper data without upper level": (lambda m, f: {"upper": None}, "upper_dataset"),
    "upper data that are a stream": (
        lambda m, f: {"upper_dataset": stream()},
        "upper_dataset.*IterableDataset",
    ),
    "upper data without a length": (
        lambda m, f: {"upper_dataset": Unsized()},
        "upper_dataset.*Unsized",
    ),
    "an optimizer without a level": (
        lambda m, f: {"optimizers": (torch.optim.AdamW(groups(m, 1e-3, 1e-3)[:1]), None)},
        "optimizers.*magnitude.* shape none",
    ),
    "an optimizer with a foreign tensor": (
        lambda m, f: {
            "optimizers": (
                torch.optim.AdamW([*groups(m, 1e-3, 1e-3), {"params": [torch.zeros(7)]}]),
                None,
            )
        },
        r"optimizers.*none.*\(7,\)",
    ),
    "an optimizer with a group of both levels": (
        lambda m, f: (
            {
                "optimizers": (
                    torch.optim.AdamW([v for x in levels(m).values() for v in x.variables]),
                    None,
                )
            }
        ),
        "optimizers.*group",
    ),
    "a scheduler of another optimizer": (
        lambda m, f: {"optimizers": (adamw(m), torch.optim.lr_scheduler.ConstantLR(adamw(m)))},
        "optimizers.*scheduler",
    ),
}


@cases(PLAIN)
def test_trainers(case: Any, tmp_path: Path) -> None:
    make, message = case
    model = peft_model()
    refuses(ProblemError, message, model, lambda: plain(model, tmp_path, **make(model, tmp_path)))


@pytest.mark.parametrize("model", [None, "bert"])
def test_a_model_must_be_a_module(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"model must be a torch\.nn\.Module"):
        BilevelTrainer(model, **levels(peft_model()), args=arguments(tmp_path), **APART)
