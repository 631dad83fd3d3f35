"""``train``: every task, and what it writes says what stock PEFT and plain PyTorch find."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from hyperopt_peft.cli.text.tasks import TASKS
from tests.support.cli import Capture, refused, results_of, run, small_run, state, stock
from tests.support.files import KINDS, rows, write


@torch.no_grad()
def expected(model: Any, tokenizer: Any, task: str) -> dict[str, float]:
    """The metrics of the evaluation examples, one example at a time."""
    config, losses = model.config, list[float]()
    true, predicted = list[Any](), list[Any]()
    for row in rows(task, number=10, seed=1):
        if task == "token-classification":
            batch = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
            true += [config.label2id[tag] for tag in row["tags"]]
            predicted += model(**batch).logits[0, :-1].argmax(-1).tolist()  # without [EOS]
            continue
        batch = tokenizer(row["text"], return_tensors="pt")
        if task == "causal-lm":
            logits = model(**batch).logits[0, :-1].log_softmax(-1)
            losses += (-logits.gather(1, batch["input_ids"][0, 1:, None])).flatten().tolist()
        elif task == "seq2seq":
            labels = tokenizer(row["target"], return_tensors="pt")["input_ids"]
            before = torch.cat([torch.tensor([[0]]), labels[:, :-1]], 1)
            logits = model(**batch, decoder_input_ids=before).logits[0].log_softmax(-1)
            losses += (-logits.gather(1, labels[0, :, None])).flatten().tolist()
        else:
            logits, label = model(**batch).logits, row["label"]
            true.append(label if task == "regression" else config.label2id[label])
            predicted.append(float(logits) if task == "regression" else int(logits.argmax(-1)))
    if losses:
        loss = sum(losses) / len(losses)
        return {"token_loss": loss, "perplexity": float(torch.tensor(loss).exp())}
    if task == "regression":
        return {
            "mse": sum((a - b) ** 2 for a, b in zip(true, predicted)) / len(true),
            "pearson": pearsonr(true, predicted).statistic,
            "spearman": spearmanr(true, predicted).statistic,
        }
    return {
        "accuracy": sum(a == b for a, b in zip(true, predicted)) / len(true),
        "macro_f1": f1_score(true, predicted, average="macro"),
        "matthews": matthews_corrcoef(true, predicted),
    }


@pytest.mark.parametrize("task", KINDS)
def test_both_phases_train_and_their_results_are_those_of_stock_peft(
    tmp_path: Path, task: str
) -> None:
    run("train", **small_run(tmp_path, task))
    results = results_of(tmp_path)
    model, tokenizer = stock(tmp_path, task)
    metrics = expected(model, tokenizer, task)
    assert TASKS[task].metric in metrics
    for name, value in metrics.items():
        assert results[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero before training
            assert parameter.abs().max() > 0
    for folder, prefix in (("out", "train"), ("out/retrain", "retrain")):
        trained = state(tmp_path / folder)
        losses = [record["loss"] for record in trained["log_history"] if "loss" in record]
        # The mean over the steps, each of which is logged here.
        assert results[f"{prefix}_loss"] == pytest.approx(sum(losses) / 4, rel=1e-3)
        assert results[f"{prefix}_runtime"] > 0 and trained["global_step"] == 4
    assert sum("upper_loss" in x for x in state(tmp_path / "out")["log_history"]) == 2
    page = (tmp_path / "out/report.html").read_text()
    assert "evaluation rows, by bidora, 8 steps" in page and "--max_steps 4" in page


def test_a_baseline_is_trained_in_one_phase_and_needs_no_evaluation(tmp_path: Path) -> None:
    """With one level, of which no part can lack the class that occurs once."""
    path = write(tmp_path / "once.jsonl", [*rows(), {"text": "w1", "label": "d"}])
    changes = {"method": "lora", "target_modules": ["query", "value"], "eval_fraction": 0}
    run("train", **small_run(tmp_path, train_file=path, eval_file=None, max_steps=1, **changes))
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert adapter["use_dora"] is False
    assert sorted(adapter["target_modules"]) == ["query", "value"]
    assert not (tmp_path / "out/retrain").exists()
    assert results_of(tmp_path)["train_loss"] > 0
    assert not [name for name in results_of(tmp_path) if name.startswith("eval")]


def test_a_resumed_run_ends_in_the_same_adapter(tmp_path: Path, capsys: Capture) -> None:
    """The first start of ``resume_from_checkpoint: true`` is a new run; another rank is refused."""
    options = small_run(tmp_path, retrain="none", save_strategy="steps", save_steps=2, dropout=0.1)
    (tmp_path / "out/checkpoint-1").mkdir(parents=True)  # a kill has left it incomplete
    run("train", **options, resume_from_checkpoint="true")
    assert "no complete checkpoint: a new run" in capsys.readouterr().out
    adapter = tmp_path / "out/adapter_model.safetensors"
    uninterrupted = adapter.read_bytes()
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    adapter.unlink()
    options["resume_from_checkpoint"] = "true"
    for name, words in (
        ("rank", r"train: rank: .*checkpoint-2 .*\b2\b.*\b4\b.*\d+ more settings"),
        ("alpha", r"train: lora_alpha: .*checkpoint-2 .*\b4\b.*\b6\b"),
    ):
        error = refused(capsys, "train", {**options, name: options[name] + 2}, words)
        assert len(error) < 500 and not adapter.exists()
    run("train", **options)
    assert adapter.read_bytes() == uninterrupted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": "quer"}, "target_modules.*'quer'.*'query'"),
        ({"target_modules": "LayerNorm"}, "target_modules.*LayerNorm"),
        ({"modules_to_save": "poler"}, "modules_to_save.*'poler'.*'pooler'"),
        ({"model": "no/such/model"}, "model: there is no folder no/such/model, and the hub"),
        ({"tokenizer": "./no-such"}, r"tokenizer: there is no folder \./no-such, and the hub"),
        ({"report_to": "comet_ml"}, "comet-ml"),
        ({"rank": 5000}, "train: rank: 5000 is above 8, "),
        ({"rank": 0}, "target_modules, rank: .*positive"),
        ({"lower_steps": 5}, "lower_steps: 5 leaves no upper step"),
        ({"lower_steps": 5, "dry_run": True}, "lower_steps: 5 leaves no upper step"),
        ({"seed": -3}, "seed must be int ≥ 0"),
        ({"eval_fraction": -0.5, "eval_file": None}, "eval_fraction: cannot hold out -50% of 24"),
        ({"upper_fraction": 0.01}, "upper_fraction: cannot hold out 1% of 24 different rows: "),
        ({"resume_from_checkpoint": "no/such"}, "no/such"),
        ({"task": "regression", "corrections": "a.csv"}, "corrections: .* regression has none"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, options: dict[str, Any], words: str, capsys: Capture
) -> None:
    refused(capsys, "train", small_run(tmp_path, **options), words)
    assert not list((tmp_path / "out").glob("adapter*"))


@pytest.mark.parametrize(
    ("command", "rate", "words"),
    [
        ("train", 1e30, "step .*the loss is nan"),
        ("train", 1e4, r"diverged: the loss is .* a guess 1\.1.*lower learning_rate"),
        ("attribute", 1e4, "diverged: the loss is"),
    ],
)
def test_a_diverged_training_is_one_line_status_1_and_no_adapter(
    tmp_path: Path, command: str, rate: float, words: str, capsys: Capture
) -> None:
    options = small_run(tmp_path, method="lora", learning_rate=rate)
    refused(capsys, command, options, words, status=1)
    assert not list((tmp_path / "out").glob("adapter*"))


def test_trusted_rows_of_one_class_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = small_run(tmp_path, method="lora")
    chosen["eval_file"] = write(
        tmp_path / "b.csv", [{"text": f"w{k}", "label": "a"} for k in (1, 2)]
    )
    run("train", "--dry_run", **chosen)
    assert "evaluation examples all have one label" in caplog.text


def test_a_decoder_classifies_texts_of_different_lengths(tmp_path: Path) -> None:
    short = [{**r, "text": r["text"][: 3 + 3 * (i % 5)]} for i, r in enumerate(rows())]
    options = {**small_run(tmp_path, "causal-lm"), "task": "text-classification"}
    options["train_file"] = write(tmp_path / "train.csv", short)
    options["eval_file"] = write(tmp_path / "eval.csv", rows(number=10, seed=1))
    run("train", **options)
    metrics = expected(*stock(tmp_path), "text-classification")
    assert results_of(tmp_path)["eval_accuracy"] == pytest.approx(metrics["accuracy"])
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert adapter["modules_to_save"] == ["classifier", "score"]
    assert not [name for name in adapter["target_modules"] if "score" in name]
