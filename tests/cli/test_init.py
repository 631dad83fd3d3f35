"""``init``: what a table is for is guessed, and the written file runs as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset

from hyperopt_peft.cli.attribute import TYPES
from hyperopt_peft.cli.guess import guess
from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.options import divided, names_of
from tests.support.cli import refused, run
from tests.support.files import KINDS, rows, save_model, write

TEXTS = [f"text number {k}" for k in range(20)]
CLASSES, AB = "text-classification", ["a", "b"] * 10
MIXED = {"text": TEXTS, "n": [*range(20)], "meta": [{"a": 1}] * 20, "label": AB}


def guessed(table: dict[str, list[Any]], task: Any = None, label: Any = None) -> tuple[Any, ...]:
    return tuple(guess(Dataset.from_dict(table), task, None, label)[:3])


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ({"id": [*range(20)], "tweet": TEXTS, "mood": AB}, (CLASSES, ["tweet"], "mood")),
        ({"label": AB, "other": AB[::-1], "text": TEXTS}, (CLASSES, ["text"], "label")),
        ({"text": TEXTS, "stars": [1, 2] * 10}, (CLASSES, ["text"], "stars")),
        (
            {"premise": TEXTS, "hypothesis": TEXTS[::-1], "label": AB},
            (CLASSES, ["premise", "hypothesis"], "label"),
        ),
        ({"text": TEXTS, "score": [k / 7 for k in range(20)]}, ("regression", ["text"], "score")),
        ({"text": TEXTS}, ("causal-lm", ["text"], None)),
        ({"prompt": TEXTS, "completion": AB}, ("causal-lm", ["prompt"], "completion")),
        (
            {"tokens": [["a", "b"]] * 9, "ner_tags": [["x", "y"]] * 9},
            ("token-classification", ["tokens"], "ner_tags"),
        ),
        (MIXED, (CLASSES, ["text"], "label")),
        ({"messages": [[{"role": "user", "content": "a"}]] * 9}, ("sft", ["messages"], None)),
    ],
)
def test_task_and_columns_are_guessed(
    table: dict[str, list[Any]], found: tuple[str, list[str], str | None]
) -> None:
    assert guessed(table) == found


@pytest.mark.parametrize(
    ("table", "given", "words"),
    [
        ({"text": TEXTS, "u": AB, "v": AB[::-1]}, {}, "label_column: could be u or v"),
        ({"text": TEXTS, "label": ["a"] * 18 + ["b"] * 2}, {}, "fewer than 5 rows of b"),
        ({"text": [None, *TEXTS[1:]], "label": AB}, {}, "'text' is empty in 1 of 20 rows"),
        ({"n": [*range(20)], "label": AB}, {}, "text_columns: none of n, label looks like texts"),
        (MIXED, {"label": "meta"}, "name another column"),
        (MIXED, {"label": "lable"}, "no column 'lable'; did you mean 'label'"),
    ],
)
def test_what_cannot_be_guessed_or_used_is_named(
    table: dict[str, list[Any]], given: dict[str, str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        guessed(table, **given)


def test_a_given_task_and_named_classes_of_a_parquet_file() -> None:
    table = {"text": TEXTS, "x": AB, "y": AB}
    assert guessed(table, task="causal-lm") == ("causal-lm", ["text"], None)
    rows = Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 10})
    found = guess(rows.cast_column("label", ClassLabel(names=["a", "b"])), None, None, None)
    assert tuple(found) == (CLASSES, ["text"], "label", "2 classes: 0 10, 1 10")


@pytest.mark.parametrize("task", KINDS)
def test_the_file_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """And so do those for other commands, whose options exist."""
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "data.jsonl", rows(task, number=60))
    model = save_model(tmp_path / "model", task)
    chosen = {"task": task} if task in ("causal-lm", "regression", "seq2seq") else {}
    chosen |= {"label_column": "target"} if task == "seq2seq" else {}
    run("init", data, model=model, **chosen)
    changes = {"use_cpu": True, "max_length": 16, "target_modules": "all-linear"}
    run("train", "config.yaml", "--dry_run", **changes)
    assert not Path("outputs").exists()
    run("init", data, "--command", "attribute", model=model, overwrite=True, **chosen)
    assert {*divided("attribute", ["config.yaml"])[0]} <= names_of(TYPES)


def test_no_file_is_replaced_or_written_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write(tmp_path / f"{k}.csv", rows(number=20, seed=k)) for k in (0, 1)]
    config = tmp_path / "config.yaml"
    refused(capsys, "init", {}, "give the file")
    argv = ["init", *files, "--config_file"]
    assert main([*argv, str(config)]) == 0
    assert yaml.safe_load(config.read_text())["train_file"] == files
    assert main([*argv, str(config)]) == 2  # the file is there
    assert main([*argv, str(tmp_path / "no/such.yaml")]) == 2
