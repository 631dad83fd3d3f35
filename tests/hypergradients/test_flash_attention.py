"""FlashAttention has no float32: first-order estimators are right, and others are refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Trainer, TrainingArguments
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import flash_attention_mask

from hyperopt_peft import (
    BilevelTrainer,
    BilevelTrainingArguments,
    Problem,
    ProblemError,
    attribute,
    hypergradient,
)
from hyperopt_peft.utils.autograd import HALF
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


class HalfAlone(torch.autograd.Function):
    """Attention whose backward pass autograd does not see, as that of FlashAttention's kernels."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if any(x.dtype not in HALF for x in (q, k, v)):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        ctx.save_for_backward(q, k, v)
        ctx.options = {"scale": scale, "is_causal": True, "enable_gqa": True}
        return scaled_dot_product_attention(q, k, v, **ctx.options)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            y = scaled_dot_product_attention(*inputs, **ctx.options)
        return (*torch.autograd.grad(y, inputs, slope), None)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any
) -> tuple[Tensor, None]:
    """Of rows without padding, after Transformers' own cast."""
    to = get_target_dtype(query, module)
    q, k, v = (x.to(to or x.dtype) for x in (query, key, value))
    return HalfAlone.apply(q, k, v, scaling).transpose(1, 2), None


@pytest.fixture(autouse=True)
def flash() -> Iterator[str]:
    """The name of FlashAttention on a CPU, which a config can choose."""
    name = "flash_on_cpu"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, flash_attention_mask)
    yield name
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name)


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
