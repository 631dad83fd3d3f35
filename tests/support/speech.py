"""Tiny speech models whose training masks are drawn from NumPy (SpecAugment), and rows of noise."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

MASKED = {"mask_time_prob": 0.5, "mask_time_length": 2, "mask_time_min_masks": 2}


def _wav2vec2() -> Any:
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
        **MASKED,
    )
    return Wav2Vec2ForSequenceClassification(config)


def _whisper() -> Any:
    config = WhisperConfig(
        vocab_size=20,
        num_mel_bins=8,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_source_positions=12,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.5,
        apply_spec_augment=True,
        **MASKED,
    )
    return WhisperForConditionalGeneration(config)


MODELS = {"wav2vec2": _wav2vec2, "whisper": _whisper}


def speech_model(kind: str) -> Any:
    """The model with LoRA, equal at every call."""
    torch.manual_seed(0)
    model = get_peft_model(MODELS[kind](), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def speech_rows(kind: str, count: int, seed: int = 0) -> Dataset:
    """Recordings of noise, each with a class or with five tokens."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "wav2vec2":
        columns = {"input_values": torch.randn(count, 120, generator=generator)}
        labels = torch.randint(0, 3, (count,), generator=generator)
    else:
        columns = {"input_features": torch.randn(count, 8, 24, generator=generator)}
        labels = torch.randint(3, 20, (count, 5), generator=generator)
    return Dataset.from_dict({k: x.tolist() for k, x in {**columns, "labels": labels}.items()})
