"""``init``: what a table is for is guessed, and the written file runs as it is."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset

from hyperopt_peft.cli.attribute import TYPES
from hyperopt_peft.cli.guess import guess
from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.options import divided, names_of
from tests.support.cli import Capture, refused, run
from tests.support.files import KINDS, flags, rows, save_model, write

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
        ({"text": TEXTS, "score": [*range(20)]}, ("regression", ["text"], "score")),
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
        ({"text": TEXTS, "y": ["a"] * 19 + ["b"]}, {"label": "y"}, "fewer than 2 rows of b"),
        ({"text": TEXTS, "label": ["a"] * 20}, {}, "label_column: .*one class, 'a'"),
        ({"text": TEXTS[:1], "label": ["a"]}, {}, "label_column: .*one class, 'a'"),
        # Not the only column with two values, of which one may be the label.
        ({"text": TEXTS, "label": ["a"] * 20, "lang": AB}, {}, "label_column: .*one class"),
        ({"text": TEXTS, "target": TEXTS}, {}, "label_column: target has 20 classes"),
        ({"text": TEXTS, "stars": ["n/a", *map(str, range(19))]}, {}, "stars has 'n/a' in row 0"),
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
    argv = [data, "--command", "attribute", "--eval_file", data, "--overwrite"]
    run("init", *argv, model=model, **chosen)
    assert {*divided("attribute", ["config.yaml"])[0]} <= names_of(TYPES)


# A file, its beginning, the options, and the words that the error has.
REFUSED: list[tuple[str, list[str], dict[str, Any], str]] = [
    ("a.csv", ["w1 w2,a"], {}, "a.csv seems to have no header.* 'a'"),
    ("a.csv", ["w1 w2,0.25"], {}, "a.csv seems to have no header.* '0.25'"),
    ("a.csv", ["text,label"], {"text_columns": "label", "label_column": "label"}, "given twice"),
    ("a.csv", ["text,label"], {"command": "attribute"}, "eval_file: attribute .*--eval_file"),
    ("a.csv", ["text,label"], {"eval_file": "no.csv"}, "eval_file: there is no file"),
    ("a.csv", ["text,label"], {"eval_file": ["b.csv"]}, "'d' is not in the training examples"),
    ("a.csv", ["text,label"], {"eval_file": ["c.csv"]}, "no column 'text'.*'texts'"),
]


@pytest.mark.parametrize(("name", "head", "options", "words"), REFUSED)
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    name: str,
    head: list[str],
    options: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [*head, *(f"{text},{label}" for text, label in zip(TEXTS, AB))]
    Path(name).write_text("\n".join(lines))
    Path("b.csv").write_text("text,label\nw1,d\n")
    Path("c.csv").write_text("texts,label\nw1,a\n")
    assert main(["init", name, *flags(**options)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(words, error), error
    assert not Path("config.yaml").exists()


def test_a_tall_file_is_read_in_seconds_and_unused_columns_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The measured time is 0.3 seconds; without care it is minutes."""
    monkeypatch.chdir(tmp_path)
    tall = "".join(f"w{k} w1,1,{'ab'[k % 2]}\n" for k in range(200_000))
    Path("tall.csv").write_text(f"text,other,mood\n{tall}")
    begin = time.process_time()
    run("init", "tall.csv")
    assert time.process_time() - begin < 20
    assert yaml.safe_load(Path("config.yaml").read_text())["label_column"] == "mood"
    assert "not used: other" in capsys.readouterr().out


def test_no_file_is_replaced_or_written_nowhere(tmp_path: Path, capsys: Capture) -> None:
    files = [write(tmp_path / f"{k}.csv", rows(number=20, seed=k)) for k in (0, 1)]
    config = tmp_path / "config.yaml"
    refused(capsys, "init", {}, "give the file")
    argv = ["init", *files, "--config_file"]
    assert main([*argv, str(config)]) == 0
    assert yaml.safe_load(config.read_text())["train_file"] == files
    assert main([*argv, str(config)]) == 2  # the file is there
    assert main([*argv, str(tmp_path / "no/such.yaml")]) == 2
