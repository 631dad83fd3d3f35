"""A tiny speech model with training masks from NumPy (SpecAugment), and rows of noise."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification


def speech_model() -> Any:
    """A Wav2Vec2 with LoRA, equal at every call."""
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
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(Wav2Vec2ForSequenceClassification(config), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def speech_rows(count: int, seed: int = 0) -> Dataset:
    """Recordings of noise, each with a class."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 120, generator=generator).tolist()
    labels = torch.randint(0, 3, (count,), generator=generator).tolist()
    return Dataset.from_dict({"input_values": noise, "labels": labels})
