"""Is a difference of a known cause found, and does a short budget say how few upper steps it had?

Three classes of 80, 10 and 10 % and texts of a small random BERT: adding log shares in training is
worth a known gain in balanced accuracy, which `ClassOffsets` has to learn. One call compares both
at two budgets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from sklearn.metrics import balanced_accuracy_score
from transformers import BertConfig, BertForSequenceClassification, default_data_collator

from hyperopt_peft import BilevelTrainingArguments
from hyperopt_peft.comparison import Choice, Comparison, Runs, compare_methods
from hyperopt_peft.problems import ClassOffsets, LogitAdjustment, LoRA

SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZE |= {"intermediate_size": 64, "vocab_size": 64, "initializer_range": 0.2, "num_labels": 3}


def texts(seed: int, *counts: int) -> Dataset:
    """Rows of eight tokens, 25 % of which are typical of the row's class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    shape = len(labels), 8
    common, typical = (torch.randint(*x, shape, generator=draw) for x in ((4, 40), (40, 44)))
    mine = torch.rand(shape, generator=draw) < 0.25
    tokens = torch.where(mine, typical + 4 * labels[:, None], common)
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})


def base_model() -> Any:
    """One random BERT, the same for all seeds, as a pretrained model is."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZE))


def score(outputs: Any) -> dict[str, float]:
    """Balanced accuracy."""
    return {"balanced": balanced_accuracy_score(outputs.label_ids, outputs.predictions.argmax(1))}


def offsets(folder: Path | None = None) -> Comparison:
    """The comparison at 150 and 400 passes, whose rates are chosen inside each seed."""
    torch.set_num_threads(1)
    return compare_methods(
        {"LoRA": LoRA(), "logit adjustment": LogitAdjustment(), "ClassOffsets": ClassOffsets()},
        base_model,
        LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value", "dense"]),
        BilevelTrainingArguments(
            "unused",
            report_to="none",
            use_cpu=True,
            per_device_train_batch_size=16,
            per_device_upper_batch_size=64,
            per_device_eval_batch_size=300,
            upper_fraction=0.25,
        ),
        train_dataset=texts(0, 480, 60, 60),
        test_dataset=texts(1, 300, 300, 300),
        passes=[150, 400],
        metric="balanced",
        choice=Choice(rates=(5e-3, 1e-2, 2e-2), upper_rates=(1e-1, 3e-1), splits=3),
        ablations={"ClassOffsets": ["frozen"]},
        runs=Runs(folder=folder, progress=False),
        data_collator=default_data_collator,
        compute_metrics=score,
    )
