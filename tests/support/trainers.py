"""Small models and data that a Trainer takes, equal at every call."""

import copy
import gc
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import ClassLabel, Dataset, Features, List, Value
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    default_data_collator,
)

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments
from hyperopt_peft.problems import BiDoRA, DoRA, LoRA

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "initializer_range": 0.5,  # the default leaves a network of this size all but constant
}
#: Where the stock Trainer does not count the first label of a causal model's rows.
COUNTS_RIGHT = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 10)
CONFIG = BertConfig(num_labels=3, **SIZES)
LENGTH = 6
#: Arguments of any Trainer: on the CPU, without bars and checkpoints, a log a step.
QUIET: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
QUIET |= {"save_strategy": "no", "logging_steps": 1}


def sampling(strategy: str) -> dict[str, Any]:
    """The arguments for an order of rows; before Transformers 5.2 "sequential" is random."""
    if "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}:
        return {"train_sampling_strategy": strategy}
    return {"group_by_length": strategy == "group_by_length"}


# Every Trainer collects garbage; what was imported, a large part of its time, is none.
gc.freeze()


def base_model(kind: str = "classes", dropout: float = 0.1) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    if kind == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    if kind == "tokens":
        return BertForTokenClassification(config)
    if kind == "causal":
        llama = LlamaConfig(tie_word_embeddings=False, attention_dropout=dropout, **SIZES)
        return LlamaForCausalLM(llama)
    if kind == "seq2seq":
        sizes = {"vocab_size": 50, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1}
        options = {"decoder_start_token_id": 0, "tie_word_embeddings": False}
        t5 = T5Config(**sizes, num_heads=2, dropout_rate=dropout, **options)
        return T5ForConditionalGeneration(t5)
    return BertForSequenceClassification(config)


TASKS = {
    "classes": ("SEQ_CLS", ["query", "value", "intermediate.dense"]),
    "soft": ("SEQ_CLS", ["query", "value"]),
    "regression": ("SEQ_CLS", ["query", "value"]),
    "tokens": ("TOKEN_CLS", ["query", "value"]),
    "causal": ("CAUSAL_LM", ["q_proj", "v_proj"]),
    "seq2seq": ("SEQ_2_SEQ_LM", ["q", "v"]),
}


def peft_model(
    kind: str = "classes", dropout: float = 0.1, dora: bool = True, **options: Any
) -> Any:
    """The model with an adapter whose B is not zero, so that A has a gradient."""
    task, targets = TASKS[kind]
    model = base_model(kind, dropout)
    torch.manual_seed(1)
    defaults = {"r": 2, "lora_alpha": 4, "lora_dropout": dropout, "target_modules": targets}
    adapter = LoraConfig(task_type=task, use_dora=dora, **{**defaults, **options})
    model = get_peft_model(model, adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def data(kind: str = "classes", rows: int = 24, seed: int = 0) -> Any:
    """Rows of ``LENGTH`` tokens, every class a third of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (rows, LENGTH), generator=generator)
    features = {"input_ids": List(Value("int64")), "attention_mask": List(Value("int64"))}
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    if kind == "classes":
        features["labels"] = ClassLabel(names=["a", "b", "c"])
        columns["labels"] = [row % 3 for row in range(rows)]
    elif kind == "soft":
        features["labels"] = List(Value("float32"))
        columns["labels"] = torch.rand(rows, 3, generator=generator).tolist()
    elif kind == "regression":
        features["labels"] = Value("float32")
        columns["labels"] = torch.randn(rows, generator=generator).tolist()
    else:
        features["labels"] = List(Value("int64"))
        columns["labels"] = ((ids % 3) if kind == "tokens" else ids).tolist()
    return Dataset.from_dict(columns, features=Features(features))


def ragged(kind: str, count: int = 24) -> Dataset:
    """Rows of which a different number of tokens is scored."""
    table = data(kind, count)
    labels = [[-100] * (row % 5) + label[row % 5 :] for row, label in enumerate(table["labels"][:])]
    return table.remove_columns("labels").add_column(
        "labels", labels, feature=table.features["labels"]
    )


def padded(rows: Dataset) -> Dataset:
    """``rows`` of one to ``LENGTH`` tokens."""
    mask = [[int(k <= row % LENGTH) for k in range(LENGTH)] for row in range(len(rows))]
    return rows.remove_columns("attention_mask").add_column("attention_mask", mask)


def longest_first(rows: list[Any]) -> Any:
    """A batch in another order than ``rows``."""
    return default_data_collator(sorted(rows, key=lambda row: -sum(row["attention_mask"])))


def arguments(folder: Path, **options: Any) -> BilevelTrainingArguments:
    """Six lower steps, an upper one after every second, on the CPU, without a bar."""
    settings = {
        "hypergradient": "darts:scheme=forward",
        "max_steps": 6,
        "lower_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "upper_learning_rate": 1e-2,
        **QUIET,
        "retrain": "none",
        "seed": 3,
    }
    return BilevelTrainingArguments(output_dir=str(folder), **{**settings, **options})


def trainer(
    folder: Path,
    kind: str = "classes",
    *,
    dropout: float = 0.1,
    rows: int = 24,
    model: nn.Module | None = None,
    options: Any = None,
    method: str = "bidora",
    **settings: Any,
) -> Any:
    """A trainer of the task; ``settings`` are the arguments' or the method's."""
    model = model or peft_model(kind, dropout, dora=method != "lora")
    chosen = {"bidora": BiDoRA, "dora": DoRA, "lora": LoRA}[method]
    own = {x.name: settings.pop(x.name) for x in fields(chosen) if x.name in settings}
    given = {"train_dataset": data(kind, rows), "method": chosen(**own), **(options or {})}
    args = arguments(folder, **settings)
    shard_on_cpus()
    return BilevelTrainer(model, args, **given)


def shard_on_cpus() -> None:
    """accelerate shards over GPUs only, and looks at no device; arguments reset what it knows."""
    if "ACCELERATE_USE_FSDP" in os.environ:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def values(model: nn.Module) -> dict[str, Any]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
