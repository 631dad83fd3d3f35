"""``attribute``: the file has one line a training row, the parts do not overlap, errors name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from hyperopt_peft.cli.main import main
from tests.support.cli import Capture, read_csv, refused, run, small_run
from tests.support.files import rows, write


def options(folder: Path, task: str = "text-classification", **changes: Any) -> dict[str, Any]:
    """Those of a small run of one level, over all 24 rows."""
    return small_run(folder, task, **{"max_steps": 6, **changes})


def written(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "out/attribution.csv")


def test_everything_at_once(tmp_path: Path, capsys: Capture) -> None:
    changes = {"check": 5, "suspects": 2, "details": True}
    config = tmp_path / "config.yaml"
    chosen = options(tmp_path, **changes)
    config.write_text(json.dumps(chosen, default=str))  # which is YAML
    run("attribute", str(config))
    table = written(tmp_path)
    assert list(table[0])[:6] == ["row", "text", "label", "score", "rank", "weight"]
    assert {"suspect", "label_confidence", "scored_on"} <= {*table[0]}
    assert [{k: line[k] for k in ("text", "label")} for line in table] == rows()
    assert [int(line["row"]) for line in table] == list(range(24))
    assert sorted(int(line["rank"]) for line in table) == list(range(1, 25))
    best = max(table, key=lambda line: float(line["score"]))
    assert best["rank"] == "1" and {line["suspect"] for line in table} <= {"0", "1"}
    assert (tmp_path / "out/attribution.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "24 training rows, 6 steps" in printed
    assert re.search(r"LDS .* over 5 retrainings", printed)
    record = json.loads((tmp_path / "out/attribution.json").read_text())
    assert len(record["check"]["actual"]) == 5
    assert {"accuracy", "kappa", "flagged"} <= {*record["suspects"]}


def test_scores_on_a_head_train_no_adapter(tmp_path: Path, capsys: Capture) -> None:
    chosen = options(tmp_path, score_model="head", check=5)
    run("attribute", **chosen)
    table, printed = written(tmp_path), capsys.readouterr().out
    assert all(line["rank"] != "0" for line in table)
    assert "Can the scores be trusted?" in printed and "retraining" in printed
    page, _, folded = (tmp_path / "out/report.html").read_text().partition("<details>")
    for expert in ("λ", "LDS", "cg:steps", "residual"):
        assert expert in folded and expert not in page and expert not in printed
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_why_with_and_without_labels(tmp_path: Path, capsys: Capture) -> None:
    """A file, a picture and a paragraph; a row without a label has none to show."""
    told = [{"text": row["text"]} for row in rows(number=3, seed=5)]
    bare = write(tmp_path / "bare.jsonl", told)
    run("attribute", **options(tmp_path, score_model="head", why=bare))
    lines = read_csv(tmp_path / "out/why.csv")
    assert {line["explained"] for line in lines} == {"0", "1", "2"}
    names = {row["label"] for row in rows()}
    assert {line["predicted"] for line in lines} <= names
    for line in lines:
        if line["row"]:
            assert line["text"] == rows()[int(line["row"])]["text"] and line["becomes"] in names
    assert (tmp_path / "out/why.png").exists()
    printed = capsys.readouterr().out
    assert f"row 0: {told[0]['text']}\n  predicted" in printed
    page = (tmp_path / "out/report.html").read_text()
    assert '"why.png"' in page and "  predicted " in page
    labelled = write(tmp_path / "labelled.jsonl", rows(number=2, seed=5))
    changes = {"why": labelled, "max_steps": 2, "overwrite_output_dir": True}
    run("attribute", **options(tmp_path, estimator="gradient", **changes))
    printed = capsys.readouterr().out
    assert f"{told[0]['text']} | {rows(number=1, seed=5)[0]['label']}" in printed


def test_tags_are_explained_by_their_words(tmp_path: Path, capsys: Capture) -> None:
    task = "token-classification"
    path = write(tmp_path / "told.jsonl", rows(task, number=3, seed=5))
    run("attribute", **options(tmp_path, task, score_model="head", why=path))
    word = rows(task, number=3, seed=5)[0]["tokens"]
    printed = capsys.readouterr().out
    assert re.search(rf"row 0, token \d+ \(({'|'.join(map(re.escape, word))})\): ", printed)


def test_formulas_get_an_apostrophe_where_that_is_wanted(tmp_path: Path) -> None:
    table = rows()
    table[3] = {**table[3], "text": f"=1+{table[3]['text']}"}
    path = write(tmp_path / "formula.jsonl", table)
    chosen = {"train_file": path, "score_model": "head"}
    for escaped, mark in ((True, "'"), (False, "")):
        changes = {"escape_formulas": escaped, "overwrite_output_dir": True}
        run("attribute", **options(tmp_path, **chosen, **changes))
        assert written(tmp_path)[3]["text"] == f"{mark}{table[3]['text']}"


def test_rows_of_others_write_no_controls_to_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    """Neither from `attribute` nor from an error; the file has them unchanged."""
    marks = "\x1b[31m\x9b2J\x07\u202e\u2066"
    table = [{**row, "text": f"{row['text']} {marks}"} for row in rows(number=34)]
    path = write(tmp_path / "marked.jsonl", table[:24])
    other = write(tmp_path / "other.jsonl", table[24:])
    run("attribute", **options(tmp_path, train_file=path, eval_file=other, score_model="head"))
    assert written(tmp_path)[0]["text"] == table[0]["text"]
    shown = capsys.readouterr().out
    assert main(["train", "--train_file", "x\x1b[31m.csv", "--model", "m"]) == 2
    shown += capsys.readouterr().err
    assert shown.count("\\x1b[31m") > 12 and "\\u202e\\u2066" in shown
    assert not set(marks) - set("[31m2J") & set(shown)


def test_the_adapter_is_that_of_plain_training(tmp_path: Path) -> None:
    adapter = tmp_path / "out/adapter_model.safetensors"
    run("attribute", **options(tmp_path, rank=4))
    # A copy, since a file may be mapped and is written again.
    attributed = {name: value.clone() for name, value in load_file(adapter).items()}
    run("train", **options(tmp_path, rank=4, method="lora", overwrite_output_dir=True))
    plain = load_file(adapter)
    assert all(torch.allclose(plain[name], value) for name, value in attributed.items())


def test_held_out_rows_are_not_in_the_file(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path / "train.csv", rows())
    changes = {"train_file": path, "eval_file": None, "eval_fraction": 0.25, "max_steps": 2}
    run("attribute", **options(tmp_path, method="dora", **changes))
    table = written(tmp_path)
    numbers = [int(line["row"]) for line in table]
    assert len(table) == 18 and numbers == sorted(numbers) != list(range(18))
    assert all(line["text"] == rows()[int(line["row"])]["text"] for line in table)
    assert PeftConfig.from_pretrained(tmp_path / "out").use_dora
    assert any(line["rank"] == "0" and line["score"] == "nan" for line in table)  # unseen


@pytest.mark.parametrize("task", ["regression", "token-classification", "causal-lm", "seq2seq"])
def test_every_task_is_scored(tmp_path: Path, task: str) -> None:
    run("attribute", **options(tmp_path, task, estimator="gradient", max_steps=2))
    table = written(tmp_path)
    assert len(table) == 24
    assert any(float(line["score"]) != 0 for line in table if line["rank"] != "0")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_file": None, "eval_fraction": 0}, "attribute needs evaluation rows"),
        ({"eval_file": "copy"}, "every row of it is a training row too"),
        ({"memory_limit": 1e-9}, r"memory_limit: .* more than the limit"),
        ({"optim": "adafactor"}, "Adafactor"),
        ({"method": "bidora"}, "training: has two levels"),
        ({"why": "none.csv"}, "why: there is no file none.csv"),
        ({"why": "copy"}, "24 of 24 rows are training rows too"),
        ({"why": "bare"}, "24 of 24 rows are training rows too"),
    ],
)
def test_bad_runs_are_named(
    tmp_path: Path, capsys: Capture, changes: dict[str, Any], words: str
) -> None:
    files = {"train": tmp_path / "train.jsonl", "copy": tmp_path / "copy.jsonl"}
    files["bare"] = tmp_path / "bare.jsonl"
    write(files["copy"], rows())
    write(files["bare"], [{"text": row["text"]} for row in rows()])
    named = {name: files.get(value, value) for name, value in changes.items()}
    refused(capsys, "attribute", options(tmp_path, **named), words)
