"""The README says what is true: its programs run, its table is what its command prints."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer

from benchmarks import pages
from benchmarks.estimators import comparison
from tests.support.documents import README, ROOT, blocks

RESULTS = ROOT / "benchmarks/results/comparison.json"


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model, and rows most of which are of one class, as the text says."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    labels = torch.arange(3).repeat_interleave(torch.tensor([480, 80, 40]))
    common, typical = torch.randint(4, 40, (600, 8)), 40 + torch.randint(4, (600, 8))
    tokens = torch.where(torch.rand(600, 8) < 0.15, typical + 4 * labels[:, None], common)
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    config = BertConfig(**size, intermediate_size=64, initializer_range=0.2, num_labels=3)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value", "dense"])
    model = get_peft_model(BertForSequenceClassification(config), lora)
    method, after = blocks(README)
    namespace = {"model": model, "rows": rows}
    exec(compile(method, "README.md", "exec"), namespace)
    offsets = namespace["trainer"].method.offsets.detach()
    assert offsets.argmax() == 0
    data = rows.shuffle(0).select(range(60))
    rest = {"train_dataset": data.select(range(40)), "eval_dataset": data.select(range(40, 60))}
    namespace |= {
        "test": rest["eval_dataset"],
        "trainer": Trainer(model.unload(), namespace["args"], **rest),
    }
    exec(compile(after, "README.md", "exec"), namespace)
    assert bool(namespace["scores"].scores.isfinite().all())


def test_the_estimator_table_is_that_of_the_measurements() -> None:
    (rows,) = json.loads(RESULTS.read_text())["tables"].values()
    assert [r["estimator"] for r in rows if r["kind"] != "peer"] == comparison.METHODS
    assert comparison.short_table(rows) in README and pages.BEGIN.format("estimator") in README
    assert comparison.estimator_table(rows) in (pages.DOCS / "mathematics.md").read_text()
    content = json.loads(RESULTS.read_text())
    assert comparison.page_table(content) in (pages.RESULTS / "comparison.md").read_text()
    # And the measurements are those of this code, where they are the same on every machine.
    measured = comparison.small({method: method for method in comparison.METHODS})
    for row in rows:
        for column, value in measured.get(row["estimator"], {}).items():
            near = isinstance(value, float)  # otherwise no cosine, or a refusal's words
            expected = pytest.approx(value, rel=0.2, abs=1e-6) if near else value
            assert row[column] == expected, row["estimator"]
