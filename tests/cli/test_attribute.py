"""``attribute``: the file has one line a training row, the parts do not overlap, errors name."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from hyperopt_peft.cli.attribute import AttributeArguments, parts
from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.text.data import DataArguments
from hyperopt_peft.cli.text.models import ModelArguments
from tests.support.cli import NOWHERE, failure, given, run
from tests.support.files import flags, rows, write

FIRST = ["row", "text", "label", "score", "rank", "weight"]


def options(folder: Path, task: str = "text-classification", **own: Any) -> dict[str, Any]:
    """Those of a small run of one level, over all 24 rows."""
    return given(folder, task, **{"max_steps": 6, **own})


def written(folder: Path) -> list[dict[str, str]]:
    with (folder / "out/attribution.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_everything_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = [
        {**row, "origin": "xy"[number % 2]} for number, row in enumerate(rows(number=10, seed=1))
    ]
    asked = {"slices": "origin", "check": 5, "suspects": 2, "retrain_without": 0.1}
    test = write(tmp_path / "test.jsonl", rows(number=9, seed=2))
    own = options(tmp_path, **asked, test_file=test)
    run("attribute", **own | {"eval_file": write(tmp_path / "sliced.jsonl", evaluation)})
    table = written(tmp_path)
    assert list(table[0])[:6] == FIRST
    assert {"score_x", "score_y", "suspect", "label_confidence"} <= {*table[0]}
    assert [(line["text"], line["label"]) for line in table] == [
        (row["text"], row["label"]) for row in rows()
    ]
    assert [int(line["row"]) for line in table] == list(range(24))
    assert sorted(int(line["rank"]) for line in table) == list(range(1, 25))
    best = max(table, key=lambda line: float(line["score"]))
    assert best["rank"] == "1" and {line["suspect"] for line in table} <= {"0", "1"}
    for line in table:  # five rows of each slice
        halves = float(line["score_x"]) + float(line["score_y"])
        assert float(line["score"]) == pytest.approx(halves / 2)
    assert (tmp_path / "out/attribution.png").stat().st_size > 10_000
    assert not PeftConfig.from_pretrained(tmp_path / "out").use_dora
    printed = capsys.readouterr().out
    assert "24 training rows, 6 steps" in printed and "hurt most:" in printed
    assert re.search(r"check: LDS .* over 5 retrainings", printed)
    assert "labels may be wrong" in printed and "on 9 rows that neither" in printed
    assert "without 2 rows by score" in printed


def test_the_weights_are_those_that_train_reads(tmp_path: Path) -> None:
    """With all weights one the adapter is that of plain training."""
    run("attribute", **options(tmp_path, rank=4))
    attributed = load_file(tmp_path / "out/adapter_model.safetensors")
    own = options(tmp_path, rank=4, method="lora")
    run("train", **own)
    plain = load_file(tmp_path / "out/adapter_model.safetensors")
    table = written(tmp_path)
    assert all(torch.allclose(plain[name], value) for name, value in attributed.items())
    for weights, like in (([1.0] * 24, True), ([float(x["weight"]) for x in table], False)):
        data = [{**row, "weight": weight} for row, weight in zip(rows(), weights)]
        train = write(tmp_path / f"weighted-{like}.jsonl", data)
        run("train", **own | {"train_file": train}, weight_column="weight")
        found = load_file(tmp_path / "out/adapter_model.safetensors")
        assert like == all(torch.allclose(plain[name], found[name]) for name in plain)


def test_held_out_rows_are_not_in_the_file(tmp_path: Path) -> None:
    own = options(tmp_path, eval_fraction=0.25, method="dora", max_steps=2)
    own |= {"train_file": write(tmp_path / "train.csv", rows())}
    del own["eval_file"]
    run("attribute", **own)
    table = written(tmp_path)
    numbers = [int(line["row"]) for line in table]
    assert len(table) == 18 and numbers == sorted(numbers) != list(range(18))
    assert all(line["text"] == rows()[int(line["row"])]["text"] for line in table)
    assert PeftConfig.from_pretrained(tmp_path / "out").use_dora
    assert any(line["rank"] == "0" and line["score"] == "nan" for line in table)  # unseen


def test_a_third_part_is_held_out_for_the_judgement(tmp_path: Path) -> None:
    own = options(tmp_path)
    model = ModelArguments(model=own["model"], task="text-classification")
    data = DataArguments(train_file=[own["train_file"]], eval_fraction=0.25, max_length=16)
    setup, test = parts(AttributeArguments(retrain_without=0.1), model, data)
    assert setup.evaluation is not None and test is not None
    kept = setup.train["row"][:] + test["row"][:]
    assert len(setup.evaluation) == 6 and len({*kept}) == len(kept) == 18
    texts = {row["text"] for row in rows()}
    assert len(texts) == 24  # so that the parts do not overlap


@pytest.mark.parametrize("task", ["regression", "token-classification", "causal-lm", "seq2seq"])
def test_every_task_is_scored(tmp_path: Path, task: str) -> None:
    """By the end of the run."""
    own = options(tmp_path, task, attribution_method="gradient")
    run("attribute", **own | {"max_steps": 2})
    table = written(tmp_path)
    assert len(table) == 24
    assert any(float(line["score"]) not in (0.0,) for line in table if line["rank"] != "0")


def test_rows_of_both_levels_of_bidora(tmp_path: Path) -> None:
    """In the order of the file, from a search and a retraining."""
    run("attribute", **options(tmp_path, method="bidora", max_steps=4, check=5))
    table = written(tmp_path)
    assert [line["text"] for line in table] == [row["text"] for row in rows()]
    assert all(float(line["score"]) != 0 for line in table)
    assert PeftConfig.from_pretrained(tmp_path / "out").use_dora


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"attribution_method": "unroled"}, "'unroled'.*unrolled"),
        ({"attribution_method": "darts"}, "darts gives no score for each row"),
        ({"check": 2}, "check.*at least 5"),
        ({"suspects": 1}, "suspects.*at least 2"),
        ({"suspects": 3}, "suspects: needs a class a row"),
        ({"retrain_without": 1.5}, "retrain_without.*1.5"),
        ({"test_file": "test.csv"}, "test_file: is of retrain_without"),
        ({"weight_column": "weight"}, "weight_column"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    asked: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(named, failure(capsys, "attribute", *flags(**NOWHERE, **asked)))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"slices": "orign"}, "evaluation examples have no column 'orign'"),
        ({"eval_file": None, "eval_fraction": 0}, "attribute needs evaluation examples"),
        ({"retrain_without": 0.1, "eval_fraction": 0}, "retrain_without needs test examples"),
        ({"retrain_without": 0.1, "test_file": "train"}, "24 of 24 rows are training examples too"),
        ({"eval_file": "copy"}, "evaluation: every row of it is a training row too"),
        ({"memory_limit": 1e-9}, r"memory_limit: .* more than the limit"),
        ({"optim": "adafactor"}, "Adafactor"),
        ({"method": "bidora", "preset": "published"}, "derivative of darts is not known"),
    ],
)
def test_bad_runs_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: dict[str, Any], named: str
) -> None:
    own = options(tmp_path)
    files = {"train": own["train_file"], "copy": write(tmp_path / "copy.jsonl", rows())}
    own |= {name: files.get(value, value) for name, value in asked.items()}
    own = {name: value for name, value in own.items() if value is not None}
    assert re.search(named, failure(capsys, "attribute", *flags(**own)))


def test_weights_must_be_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [{**row, "weight": -1.0 if number == 4 else 1.0} for number, row in enumerate(rows())]
    own = options(tmp_path, method="lora", weight_column="weight")
    own |= {"train_file": write(tmp_path / "weighted.jsonl", data)}
    assert "row 5 of 'weight' is -1.0" in failure(capsys, "train", *flags(**own))


def test_options_are_read_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    own = options(tmp_path, attribution_method="minres:damping=1.0", show=3)
    config.write_text(json.dumps(own, default=str))  # which is YAML
    assert main(["attribute", str(config)]) == 0
    assert len(written(tmp_path)) == 24
