"""Untrained models of Llama's shape, LoRA on all linear layers, and rows of random tokens."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments
from hyperopt_peft.problems import EqualSources, Sources

#: Hidden and intermediate size, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 500),
    "100M": (576, 1536, 30, 9, 3, 49152),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}
#: Two sources; the trusted rows are one more.
SOURCES = ("one", "other")


def config(shape: str) -> LlamaConfig:
    """The configuration of a shape; the small ones share head and embeddings, as published."""
    hidden, inner, layers, heads, keys, vocabulary = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        tie_word_embeddings=shape not in ("8B", "70B"),
        use_cache=False,
    )


def base(
    shape: str, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", attention: str = "sdpa"
) -> Any:
    """A model with untrained weights."""
    torch.manual_seed(0)
    of_shape, default = config(shape), torch.get_default_dtype()
    of_shape._attn_implementation = attention
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(of_shape)
    finally:
        torch.set_default_dtype(default)


def adapted(model: Any, rank: int = 16, dora: bool = False) -> Any:
    """``model`` with an adapter in float32 on all linear layers."""
    options = {"r": rank, "target_modules": "all-linear", "use_dora": dora}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def rows(shape: str, count: int, length: int, seed: int = 0) -> Dataset:
    """Random tokens, all of which have a label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SHAPES[shape][-1], (count, length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def collated(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows of one length."""
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


def options(size: int, device: str, **more: Any) -> dict[str, Any]:
    """Arguments of a Trainer that writes nothing, in bf16."""
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": size,
        "bf16": True,
        "use_cpu": device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


def plain(
    shape: str, model: Any, size: int, length: int, device: str = "cpu", **more: Any
) -> Trainer:
    """A Trainer without levels."""
    args = TrainingArguments(**options(size, device, **more))
    data = rows(shape, 8 * size, length)
    return Trainer(model, args, train_dataset=data, data_collator=collated)


def sources(
    shape: str,
    model: Any,
    estimator: str | None,
    size: int,
    length: int,
    device: str = "cpu",
    **more: Any,
) -> BilevelTrainer:
    """`Sources` with ``size`` rows a step at each level; without an estimator one level alone."""
    search = {"hypergradient": estimator or "direct", "per_device_upper_batch_size": size}
    args = BilevelTrainingArguments(**options(size, device, **search, retrain="none", **more))
    count = 4 * size
    parts = [rows(shape, count, length, k + 1) for k in range(len(SOURCES))]
    named = [x.add_column("source", [name] * count) for x, name in zip(parts, SOURCES)]
    return BilevelTrainer(
        model,
        args,
        method=Sources() if estimator else EqualSources(),
        train_dataset=concatenate_datasets(named),
        upper_dataset=rows(shape, size, length) if estimator else None,
        data_collator=collated,
    )
