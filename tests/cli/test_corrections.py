"""From doubtful labels to a training on corrected ones, and rows that may not judge it."""

import csv
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hyperopt_peft.cli.main import main
from tests.support.cli import Capture, read_csv, refused, run, small_run
from tests.support.files import rows, write

NUMBER = 90
WRONG = {3: "b", 10: "a"}


def attributed(folder: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run on a head, which has written its files, on two wrong labels."""
    table = [
        {**row, "label": WRONG.get(k, row["label"])} for k, row in enumerate(rows(number=NUMBER))
    ]
    options = small_run(folder, train_file=write(folder / "wrong.csv", table))
    run("attribute", **changed(options, score_model="head", output_dir=folder / "rows", **changes))
    return options


def changed(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """``options`` with ``changes``, of which None leaves one out."""
    return {name: value for name, value in {**options, **changes}.items() if value is not None}


def test_corrected_labels_are_trained_on_by_the_command_that_is_shown(
    tmp_path: Path, capsys: Capture
) -> None:
    """The same adapter as with the right file; the rows that scored cannot judge."""
    options = attributed(tmp_path)
    printed = capsys.readouterr().out
    right = rows(number=NUMBER)
    lines = read_csv(tmp_path / "rows/suspects.csv")
    evidence = ["label", "likely_label", "label_confidence", "training_loss", "score"]
    assert [*lines[0]] == ["row", "text", *evidence, "same_text", "scored_on"]
    confidence = [float(line["label_confidence"]) for line in lines]
    assert confidence == sorted(confidence) and {*WRONG} <= {int(line["row"]) for line in lines}
    first, *others = printed.splitlines()
    command = next(line for line in others if "hyperopt-peft train" in line)
    assert (
        "suspects.csv" in first and "<p><b>Read the " in (tmp_path / "rows/report.html").read_text()
    )
    for line in lines:
        line["label"] = right[int(line["row"])]["label"]
    # In another order, with spaces and an apostrophe, as a spreadsheet may leave them.
    edited = [{**line, "text": f"'{line['text']} "} for line in reversed(lines)]
    marked = [{**line, "label": f"'{line['label']}"} for line in edited]
    write(tmp_path / "rows/suspects.csv", marked)
    words = shlex.split(command)
    first_round = write(tmp_path / "first.csv", [{**edited[0], "label": "c"}])
    place = words.index(f"--corrections={tmp_path}/rows/suspects.csv")
    words[place : place + 1] = ["--corrections", first_round, f"{tmp_path}/rows/suspects.csv"]
    words[words.index("--eval_file=TEST_ROWS.csv")] = f"--eval_file={options['eval_file']}"
    assert words[:2] == ["hyperopt-peft", "train"]
    assert main(words[1:]) == 0
    printed = capsys.readouterr().out
    assert f"2 labels corrected by {first_round}, {tmp_path}/rows/suspects.csv" in printed
    assert "too good: 10 of the 10 rows have scored the training rows" in printed
    changes = {"train_file": write(tmp_path / "right.csv", right), "method": "lora"}
    changes["output_dir"] = tmp_path / "right"
    run("train", **{**options, **changes})
    assert "too good" not in capsys.readouterr().out
    first, second = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("rows-corrected", "right")
    )
    assert first == second


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": None}, "corrections have no column 'label'"),
        ({"row": None}, "corrections have no column 'row'"),
        ({"label": ""}, "corrections: column 'label' is empty in 1 of 2 rows, first in row 1"),
        ({"label": "aa"}, r"line 3: the label 'aa' is not in .* did you mean 'a'\?"),
        ({"row": 24}, "line 3: there is no row 24; rows are 0 to 23"),
        ({"row": -1}, "line 3: there is no row -1"),
        ({**rows()[0], "row": 0, "label": "b"}, "line 3: line 2 gives row 0 another label"),
        ({"row": "x"}, "line 2: there is no row '0'"),
        ({"text": "w1 w2"}, "line 3: row 1 of train_file has another text"),
    ],
)
def test_edited_files_that_do_not_fit_are_named(
    tmp_path: Path, capsys: Capture, changes: dict[str, Any], words: str
) -> None:
    lines = [{"row": k, **row} for k, row in enumerate(rows()[:2])]
    lines[1] |= changes
    if None in changes.values():
        lines = [{k: x for k, x in line.items() if k not in changes} for line in lines]
    path = tmp_path / "edited.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0]])
        writer.writeheader()
        writer.writerows(lines)
    options = small_run(tmp_path, corrections=path)
    refused(capsys, "train", options, words)


def test_one_text_with_two_labels_is_suspect(tmp_path: Path) -> None:
    table = rows(number=NUMBER)
    path = write(tmp_path / "twice.csv", [*table, {**table[5], "label": "a"}])
    run("attribute", **small_run(tmp_path, train_file=path, score_model="head"))
    page = (tmp_path / "out/report.html").read_text()
    assert "The same text with another label</h2>\n<pre>2 rows" in page
    for name, expected in (("suspects", {5, NUMBER}), ("attribution", {*range(NUMBER + 1)})):
        lines = read_csv(tmp_path / f"out/{name}.csv")
        same = {int(line["row"]): line["same_text"] for line in lines}
        assert {*same} >= expected and same[5] == same[NUMBER] == "5"
        assert not {text for row, text in same.items() if row not in (5, NUMBER)} - {""}


def test_a_second_round_keeps_the_corrections_of_the_first(tmp_path: Path, capsys: Capture) -> None:
    first = tmp_path / "rows/suspects.csv"
    options = changed(attributed(tmp_path), score_model="head", corrections=first)
    again = {**options, "output_dir": tmp_path / "rows", "overwrite_output_dir": True}
    refused(capsys, "attribute", again, "corrections: this run would replace the file")
    run("attribute", **options)
    assert f"--corrections {first} {tmp_path}/out/suspects.csv" in capsys.readouterr().out


def test_rows_that_made_weights_do_not_judge_them(tmp_path: Path, capsys: Capture) -> None:
    """The file of weights is renamed, sorted and cut; the trusted rows are in another file."""
    options = attributed(tmp_path)
    lines = read_csv(tmp_path / "rows/attribution.csv")
    lines = sorted(lines, key=lambda line: float(line["score"]))[:70]
    weights = write(tmp_path / "renamed.csv", lines)
    trusted = [{**row, "text": f" {row['text']}"} for row in rows(number=10, seed=1)[:4]]
    other = write(tmp_path / "other.jsonl", [*trusted, *rows(number=5, seed=9)])
    weighted = changed(options, train_file=weights, eval_file=other, max_steps=None)
    compared = {**weighted, "methods": ["lora", "given_weights"], "score_model": "head"}
    words = "[34] of 9 rows have scored the training rows"
    refused(capsys, "compare", compared, f"eval_file: {words}")
    folds = changed(compared, upper_file=other, eval_file=None, folds=2)
    refused(capsys, "compare", folds, f"upper_file: {words}")
    run("train", **weighted, method="given_weights", max_steps=2)
    assert re.search("too good: [34] of the 9 rows", capsys.readouterr().out)


def test_a_held_out_part_may_have_scored_too(tmp_path: Path, capsys: Capture) -> None:
    held_out = {"eval_file": None, "eval_fraction": 0.25, "suspects": 0}
    options = attributed(tmp_path, **held_out)
    lines = [{**row, "row": k, "scored_on": ""} for k, row in enumerate(rows()[:1])]
    scored = read_csv(tmp_path / "rows/attribution.csv")
    lines[0]["scored_on"] = " ".join(line["scored_on"] for line in scored)
    one = write(tmp_path / "one.csv", lines)
    again = changed(options, **{**held_out, "suspects": None}, method="lora", corrections=one)
    run("train", **again)
    assert re.search("too good: 23 of the 23 rows", capsys.readouterr().out)
