"""The names of transformers and accelerate that are not promised, and the public ones overridden.

A release that moves one of them fails here, with the name.
"""

import inspect
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from hyperopt_peft import BilevelTrainer
from hyperopt_peft.trainer.callback import BilevelCallback
from hyperopt_peft.trainer.internals import NEEDED
from hyperopt_peft.trainer.over import Combined


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_private_names() -> None:
    assert (SCHEDULER_NAME, TRAINER_STATE_NAME) == NEEDED


# What is overridden, with the parameters that a caller gives.
OVERRIDDEN = {
    "train": ["resume_from_checkpoint"],
    "create_optimizer": [],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "log": ["logs", "start_time"],
    "save_model": ["output_dir"],
    "prediction_step": ["model", "inputs", "prediction_loss_only", "ignore_keys"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_model_card": [],
    "hyperparameter_search": [],
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_overridden_is_called_as_it_was(name: str) -> None:
    assert set(OVERRIDDEN[name]) <= set(parameters(getattr(Trainer, name)))


def test_nothing_private_is_overridden() -> None:
    """Neither by the Trainer nor by the callback, and nothing that is not listed above."""
    own = [base for base in BilevelTrainer.__mro__ if isinstance(base, Combined)]
    ours = {name for base in own for name in vars(base) if not name.startswith("__")}
    assert {name for name in ours if hasattr(Trainer, name)} == set(OVERRIDDEN)
    events = {name for name in vars(BilevelCallback) if not name.startswith("__")}
    assert not {n for n in events if n.startswith("_") and hasattr(TrainerCallback, n)}


READ = ["current_flos", "is_fsdp_enabled", "is_deepspeed_enabled", "optimizer_cls_and_kwargs"]
READ += ["compute_loss_func", "model_wrapped", "accelerator", "is_in_train"]
READ += ["model_accepts_loss_kwargs", "current_gradient_accumulation_steps"]


@pytest.mark.parametrize("name", READ)
def test_the_attributes_that_are_read_are_there(name: str) -> None:
    source = inspect.getsource(Trainer)
    assert f"self.{name} =" in source or f"self.{name}," in source
    assert callable(Trainer.compute_loss_context_manager)
