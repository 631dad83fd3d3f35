"""Dot products through PEFT's layers, over language models as they are loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from hyperopt_peft import ProblemError, hypergradient
from hyperopt_peft.adapters import set_norm_grad, use_fast_dora
from hyperopt_peft.hypergradients import get_estimator
from hyperopt_peft.hypergradients.estimate import check_estimator
from tests.support.language import fuse_head, language_model, lora, quantised
from tests.support.quadratic import relative_error
from tests.support.weighted_levels import weighted

EMBEDDED = {"target_modules": ["embed_tokens", "q_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "biases": {"lora_bias": True},
    "saved head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
}


def adapted(model: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model or language_model(torch.float64), lora(**options))


def slope(model: nn.Module, method: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The hypergradient of three sources' weights, in training mode."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 20, (10, 7), generator=generator)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][::2, 5:] = 0
    batch["labels"] = ids.where(batch["attention_mask"] > 0, -100)
    torch.manual_seed(0)
    model.train()
    return hypergradient(
        *weighted("source", model, 3, dtype),
        method,
        upper_batch={name: column[6:] for name, column in batch.items()},
        lower_batch={name: c[:6] for name, c in batch.items()} | {"source": torch.arange(6) % 3},
        seed=0,
    )[0]


def assert_exact(model: nn.Module, tolerance: float) -> None:
    exact, dots = (slope(model, f"darts:product={product}") for product in ("exact", "dots"))
    assert relative_error(dots, exact) < tolerance


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_have_exact_products(adapter: str) -> None:
    """To the rounding of Llama's norms, which are in float32 at best."""
    assert_exact(adapted(**ADAPTERS[adapter]), 1e-5)


@pytest.mark.filterwarnings("ignore:.*exact product differs")  # the norm is detached
@pytest.mark.parametrize("fast", [False, True])
def test_dora_with_a_constant_norm_and_magnitude(fast: bool) -> None:
    """PEFT's layer calls A and B on an identity matrix too, outside of the gradient."""
    model = adapted(use_dora=True, target_modules=["q_proj", "down_proj"])
    with pytest.raises(ProblemError, match=r"magnitude.*product=difference"):
        slope(model, "darts:product=dots")
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.requires_grad_(False)
    if fast:
        use_fast_dora(model, "detach")
    assert_exact(model, 1e-5)
    with pytest.raises(ProblemError, match="product=difference"):  # the norm in the graph
        slope(set_norm_grad(model), "darts:product=dots")


def test_an_adapter_of_embeddings_is_refused() -> None:
    with pytest.raises(ProblemError, match=r"lora_embedding.*product=difference"):
        slope(adapted(**EMBEDDED), "darts:product=dots")


@pytest.mark.parametrize(
    ("method", "adapter"), [("fastmix", "plain"), ("darts:product=dots", "saved head")]
)
def test_a_fused_head_is_refused_before_any_step(method: str, adapter: str) -> None:
    """It reads the weight, which "saved head" trains and whose gradient ``fastmix`` takes."""
    model = adapted(**ADAPTERS[adapter])
    levels = weighted("source", model, 2)
    check_estimator(get_estimator(method), *levels)
    fuse_head(model.get_base_model())
    with pytest.raises(ProblemError, match="output layer"):
        check_estimator(get_estimator(method), *levels)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(bits: int, tmp_path: Path) -> None:
    """Rounded activations in 8 bits are no obstacle, since nothing is moved."""
    pytest.importorskip("bitsandbytes")
    assert_exact(adapted(quantised(tmp_path, bits=bits)), 1e-4)
