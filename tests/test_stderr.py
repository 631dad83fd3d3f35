"""Warnings of other libraries that a user cannot act on do not reach stderr."""

from pathlib import Path

import pytest

from tests.support.process import python

TRAINER = """
from datasets import Dataset
from hyperopt_peft import BiDoRA, BilevelTrainer, BilevelTrainingArguments
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = BertForSequenceClassification(BertConfig(vocab_size=64, intermediate_size=32, **size))
config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], use_dora=True)
rows = Dataset.from_dict({"input_ids": [[k, 2, 3, 4] for k in range(20)], "labels": [0, 1] * 10})
args = BilevelTrainingArguments("outputs", max_steps=5, report_to="none", save_strategy="no")
trainer = BilevelTrainer(get_peft_model(model, config), args, method=BiDoRA(), train_dataset=rows)
trainer.train()
trainer.evaluate(rows)
"""


@pytest.mark.slow
def test_neither_a_missing_kernel_nor_pinned_memory(tmp_path: Path) -> None:
    errors = python("-c", TRAINER, folder=tmp_path, CUDA_VISIBLE_DEVICES="").stderr
    assert "gemm_4bit" not in errors and "pin_memory" not in errors
