"""FlashAttention has no float32: first-order estimators are right, and others are refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hyperopt_peft import (
    BilevelTrainer,
    BilevelTrainingArguments,
    Problem,
    ProblemError,
    attribute,
    hypergradient,
)
from tests.support.flash_attention import flash_attention
from tests.support.language import language_model, lora
from tests.support.minilm import cosine
from tests.support.quadratic import FunctionLevel
from tests.support.weighted_levels import weighted

IDS = torch.randint(3, 20, (6, 8), generator=torch.Generator().manual_seed(0))
REFUSED = (
    *("darts", "darts:product=exact", "minres:product=difference"),
    *("cg", "f2sa", "unrolled:product=difference"),
)
REMEDY = 'choose direct or product=dots, or load the model with attn_implementation="sdpa"$'


@pytest.fixture(autouse=True)
def flash() -> Iterator[str]:
    with flash_attention() as name:
        yield name


def adapted(attention: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = language_model(dtype)
    model.config._attn_implementation = attention
    torch.manual_seed(1)
    return get_peft_model(model, lora(target_modules=["q_proj", "v_proj"]))


def levels(
    attention: str, dtype: torch.dtype = torch.bfloat16, *, checkpointed: bool = False
) -> tuple[Problem, Problem]:
    model = adapted(attention, dtype)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    upper, lower = weighted("index", model.train(), 6, torch.float32)
    lower.optimizer = torch.optim.SGD(lower.variables, lr=0.1)
    return upper, lower


def gradient(method: str, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    above, below = (
        {"input_ids": ids, "labels": ids, "index": torch.arange(6)} for ids in (IDS.flip(1), IDS)
    )
    both = levels(*args, **options)
    return hypergradient(*both, method, upper_batch=above, lower_batch=below)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", REFUSED)
def test_products_in_float32_are_refused(method: str, checkpointed: bool, flash: str) -> None:
    with pytest.raises(ProblemError, match=f"^the loss: FlashAttention only .*{REMEDY}"):
        gradient(method, flash, checkpointed=checkpointed)


@pytest.mark.filterwarnings("ignore:.* the relative residual is")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", ["darts:product=dots", "sdpa", "sdpa, dots"])
def test_the_remedies_are_right(method: str, checkpointed: bool, flash: str) -> None:
    """To the eight bits of the model's own gradients, in which dots and ∂F/∂w are."""
    attention = "sdpa" if "sdpa" in method else flash
    estimator = "darts" if method == "sdpa" else "darts:product=dots"
    actual = gradient(estimator, attention, checkpointed=checkpointed)
    exact = gradient("darts:product=exact", "eager")
    assert cosine(actual, exact) > 1 - 8 * torch.finfo(torch.bfloat16).eps


def data(ids: Tensor = IDS) -> Dataset:
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


@pytest.mark.parametrize("method", ["darts", "cg"])
def test_a_trainer_refuses_before_training(method: str, flash: str, tmp_path: Path) -> None:
    model, u = adapted(flash), nn.Parameter(torch.ones(()))
    w = [p for p in model.parameters() if p.requires_grad]
    settings = {"hypergradient": method, "report_to": "none", "use_cpu": True}
    with pytest.raises(ProblemError, match=f"{flash} has no float32; .*{REMEDY}"):
        BilevelTrainer(
            model,
            lower=lambda t: FunctionLevel(lambda batch: u * t.task_loss(batch), w),
            upper=lambda t: FunctionLevel(t.task_loss, [u]),
            args=BilevelTrainingArguments(str(tmp_path), **settings),
            train_dataset=data(),
            upper_dataset=data(IDS.flip(1)),
        )


@pytest.mark.parametrize("estimator", ["unrolled", "gradient"])
def test_attribution_refuses_before_training(estimator: str, flash: str, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(adapted(flash), args, train_dataset=data(), eval_dataset=data(IDS.flip(1)))
    with pytest.raises(ProblemError, match=f"{flash} has no float32; .*{REMEDY}"):
        attribute(trainer, estimator=estimator)
    assert trainer.state.global_step == 0
