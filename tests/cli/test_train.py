"""``train``: every task, and what it writes says what stock PEFT and plain PyTorch find."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.text.tasks import TASKS
from tests.support.cli import failure, given, state, stock
from tests.support.files import KINDS, flags, rows, write
from tests.support.trainers import base_model


@pytest.fixture(scope="module", params=KINDS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder of a finished run, and its task."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", *flags(**given(folder, request.param))]) == 0
    return folder, request.param


@torch.no_grad()
def expected(model: Any, tokenizer: Any, task: str) -> dict[str, float]:
    """The metrics of the evaluation examples, one example at a time."""
    config, examples = model.config, rows(task, number=10, seed=1)
    true, predicted, losses = [], [], []
    for row in examples:
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
        elif task == "regression":
            true.append(row["label"])
            predicted.append(float(model(**batch).logits))
        else:
            true.append(config.label2id[row["label"]])
            predicted.append(int(model(**batch).logits.argmax(-1)))
    if losses:
        loss = sum(losses) / len(losses)
        return {"token_loss": loss, "perplexity": float(torch.tensor(loss).exp())}
    if task == "regression":
        errors = [(a - b) ** 2 for a, b in zip(true, predicted)]
        return {
            "mse": sum(errors) / len(errors),
            "pearson": pearsonr(true, predicted).statistic,
            "spearman": spearmanr(true, predicted).statistic,
        }
    return {
        "accuracy": sum(a == b for a, b in zip(true, predicted)) / len(true),
        "macro_f1": f1_score(true, predicted, average="macro"),
        "matthews": matthews_corrcoef(true, predicted),
    }


def results_of(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "out/all_results.json").read_text())
    return results


def test_results_are_what_stock_peft_finds(trained: tuple[Path, str]) -> None:
    folder, task = trained
    results = results_of(folder)
    model, tokenizer = stock(folder, task)
    found = expected(model, tokenizer, task)
    assert TASKS[task].metric in found
    for name, value in found.items():
        assert results[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_results_have_the_numbers_of_each_phase_apart(trained: tuple[Path, str]) -> None:
    """``train_loss`` is the mean over the steps, each of which is logged here."""
    folder, _ = trained
    results = results_of(folder)
    for phase, prefix in (("out", "train"), ("out/retrain", "retrain")):
        losses = [
            record["loss"] for record in state(folder / phase)["log_history"] if "loss" in record
        ]
        assert results[f"{prefix}_loss"] == pytest.approx(sum(losses) / 4, rel=1e-3)
        assert results[f"{prefix}_runtime"] > 0
    assert results["train_loss"] != results["retrain_loss"]


def test_both_phases_and_levels_were_trained(trained: tuple[Path, str]) -> None:
    folder, task = trained
    search, again = state(folder / "out"), state(folder / "out/retrain")
    assert (search["global_step"], again["global_step"]) == (4, 4)
    assert sum("upper_loss" in record for record in search["log_history"]) == 2
    model, _ = stock(folder, task)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero before training
            assert parameter.abs().max() > 0
    card = (folder / "out/README.md").read_text()
    assert "library_name: peft" in card and "- method: bidora" in card


def test_a_control_is_trained_in_one_phase(tmp_path: Path) -> None:
    options = given(tmp_path, method="lora", target_modules=["query", "value"])
    assert main(["train", *flags(**options)]) == 0
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert adapter["use_dora"] is False
    assert sorted(adapter["target_modules"]) == ["query", "value"]
    assert not (tmp_path / "out/retrain").exists()
    assert results_of(tmp_path)["train_loss"] > 0


def test_without_evaluation_there_are_no_metrics(tmp_path: Path) -> None:
    options = given(tmp_path, eval_fraction=0, method="dora", max_steps=1)
    del options["eval_file"]
    assert main(["train", *flags(**options)]) == 0
    assert not [name for name in results_of(tmp_path) if name.startswith("eval")]


def test_resumed_run_ends_in_the_same_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another rank the run is refused: the first setting is named, the others are counted."""
    options = given(tmp_path, retrain="none", save_strategy="steps", save_steps=2, dropout=0.1)
    argv = ["train", *flags(**options)]
    assert main(argv) == 0
    adapter = tmp_path / "out/adapter_model.safetensors"
    whole = adapter.read_bytes()
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    adapter.unlink()
    capsys.readouterr()
    resume = ["--resume_from_checkpoint", "true"]
    error = failure(capsys, *argv, "--rank", "4", *resume)
    assert re.search(r"train: rank: .*checkpoint-2 .*\b2\b.*\b4\b.*\d+ more settings", error), error
    assert len(error) < 500 and not adapter.exists()
    assert main([*argv, *resume]) == 0
    assert adapter.read_bytes() == whole


def test_nothing_to_resume_from_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = flags(**given(tmp_path), resume_from_checkpoint="true")
    error = failure(capsys, "train", *argv)
    assert "checkpoint" in error and str(tmp_path / "out") in error


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": "quer"}, ["target_modules", "'quer'", "'query'"]),
        ({"target_modules": "LayerNorm"}, ["target_modules", "LayerNorm"]),
        ({"modules_to_save": "poler"}, ["modules_to_save", "'poler'", "'pooler'"]),
        ({"model": "no/such/model"}, ["model: there is no folder no/such/model"]),
        ({"model": "no-such"}, ["model: no-such", "hub"]),
        ({"max_length": 600}, ["max_length=600", "512"]),
        ({"report_to": "comet_ml"}, ["comet-ml"]),
        ({"tokenizer": "./no-such"}, ["tokenizer: there is no folder ./no-such"]),
        ({"upper_fraction": 0.01}, ["24 training examples", "upper level"]),
        ({"fp16": True}, ["fp16"]),
        ({"hypergradient": "unrolled:steps=2"}, ["unrolled"]),
        ({"output_dir": "/dev/null/below"}, ["output_dir", "/dev/null"]),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path,
    options: dict[str, Any],
    named: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = failure(capsys, "train", *flags(**given(tmp_path, **options)))
    assert all(word in error for word in named), error
    assert not (tmp_path / "out").exists()


def test_a_tied_target_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = given(tmp_path, "causal-lm", target_modules=["embed_tokens"])
    model = base_model("causal")
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "model")
    assert "embed_tokens" in failure(capsys, "train", *flags(**options))


def test_a_decoder_classifies_texts_of_different_lengths(tmp_path: Path) -> None:
    options = {**given(tmp_path, "causal-lm"), "task": "text-classification"}
    short = [{**r, "text": r["text"][: 3 + 3 * (i % 5)]} for i, r in enumerate(rows())]
    options["train_file"] = write(tmp_path / "train.csv", short)
    options["eval_file"] = write(tmp_path / "eval.csv", rows(number=10, seed=1))
    assert main(["train", *flags(**options)]) == 0
    model, tokenizer = stock(tmp_path, "text-classification")
    found = expected(model, tokenizer, "text-classification")
    assert results_of(tmp_path)["eval_accuracy"] == pytest.approx(found["accuracy"])
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert adapter["modules_to_save"] == ["classifier", "score"]
    assert not [name for name in adapter["target_modules"] if "score" in name]
