"""``mix``: weights, picture, what other trainers read, and a verdict; errors are named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftConfig

from tests.support.cli import failure, given, run
from tests.support.files import flags, rows, write


def options(folder: Path, **own: Any) -> dict[str, Any]:
    """Two sources of 24 rows in files, the labels of one of them swapped."""
    start = given(folder, "text-classification", **{"max_steps": 4, "retrain_steps": 2})
    labels = sorted({row["label"] for row in rows()})
    swapped = [
        {**row, "label": labels[(labels.index(row["label"]) + 1) % len(labels)]}
        for row in rows(seed=5)
    ]
    files = {
        "web": write(folder / "web.jsonl", rows()),
        "swapped": write(folder / "swapped.jsonl", swapped),
    }
    del start["train_file"], start["eval_file"]
    trusted = write(folder / "trusted.jsonl", rows(number=12, seed=7))
    mix = {"sources": json.dumps({k: str(v) for k, v in files.items()}), "trusted_file": trusted}
    return start | mix | {"verdict": 0} | own


def test_everything_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = write(tmp_path / "test.jsonl", rows(number=9, seed=8))
    run("mix", **options(tmp_path, test_file=test, verdict=2, equal_passes=False))
    found = json.loads((tmp_path / "out/weights.json").read_text())["sources"]
    assert list(found) == ["web", "swapped", "trusted"]
    assert sum(source["share"] for source in found.values()) == pytest.approx(1)
    assert found["web"]["rows"] == found["swapped"]["rows"] == 24
    assert (tmp_path / "out/weights.png").stat().st_size > 5_000
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == "LORA"
    documents = (tmp_path / "out/mixture.yaml").read_text().split("\n\n")
    trl, axolotl, factory = map(yaml.safe_load, documents)
    files = [entry["data_files"] for entry in trl["datasets"]]
    assert [Path(file).name for file in files] == ["web.jsonl", "swapped.jsonl"]
    ratio = found["swapped"]["row_weight"] / found["web"]["row_weight"]
    kept = [entry["weight"] for entry in axolotl["datasets"]]
    assert max(kept) == 1 and kept[1] / kept[0] == pytest.approx(ratio, abs=2e-3)
    odds = [float(x) for x in factory["interleave_probs"].split(",")]
    assert sum(odds) == pytest.approx(1, abs=1e-8)  # what interleave_datasets asks for
    assert odds[1] / odds[0] == pytest.approx(ratio, abs=2e-3)
    printed = capsys.readouterr().out
    assert re.search(r"source +rows +share", printed) and "learnt weights" in printed
    assert "by 2 folds of 12 trusted examples" in printed and "use " in printed
    assert "eval_loss" in printed


def test_nothing_has_to_be_logged(tmp_path: Path) -> None:
    """By default the Trainer logs every 500 steps, and most searches are shorter."""
    options_of = options(tmp_path, logging_strategy="no")
    sources = {name: str(tmp_path / f"{name}.jsonl") for name in ("web", "swapped")}
    run(
        "mix", **{**options_of, "sources": yaml.safe_dump(sources, default_flow_style=True).strip()}
    )
    assert (tmp_path / "out/weights.png").stat().st_size > 5_000
    assert (tmp_path / "out/mixture.yaml").exists()


def test_test_examples_that_are_trained_on_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    test = write(tmp_path / "test.jsonl", rows()[:6] + rows(number=4, seed=8))
    run("mix", **options(tmp_path, test_file=test))
    assert "6 of 10 test examples are in a source too" in caplog.text


def test_sources_in_a_column_and_in_a_configuration(tmp_path: Path) -> None:
    """A mapping in YAML is one of files; a column needs one file."""
    own = options(tmp_path)
    named = [{**row, "origin": "uv"[k % 2]} for k, row in enumerate(rows())]
    both = {**own, "train_file": write(tmp_path / "all.jsonl", named), "source_column": "origin"}
    del both["sources"]
    run("mix", **both)
    found = json.loads((tmp_path / "out/weights.json").read_text())["sources"]
    assert {name: source["rows"] for name, source in found.items()} == {
        "u": 12,
        "v": 12,
        "trusted": 12,
    }
    assert not (tmp_path / "out/mixture.yaml").exists()


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"trusted_file": None}, "trusted_file: give"),
        ({"sources": None}, "sources: give the files of each source"),
        ({"sources": "web.jsonl"}, "sources: must map names"),
        ({"sources": "only"}, "two or more"),
        ({"source_column": "origin"}, "sources: give the files as sources"),
        ({"verdict": 1}, "verdict: must be 0 or at least 2"),
        ({"eval_file": "any.jsonl"}, "eval_file: not an option of mix, which has test_file"),
        ({"weight_column": "w"}, "weight_column: not an option of mix, which learns them"),
        ({"trusted_file": "web"}, r"24 of 24 rows are in a source too"),
    ],
)
def test_bad_options_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: dict[str, Any], named: str
) -> None:
    own = options(tmp_path)
    if asked.get("sources") == "only":
        asked = {"sources": json.dumps({"web": str(tmp_path / "web.jsonl")})}
    if asked.get("trusted_file") == "web":
        asked = {"trusted_file": tmp_path / "web.jsonl"}
    given_options = {name: value for name, value in {**own, **asked}.items() if value is not None}
    assert re.search(named, failure(capsys, "mix", *flags(**given_options)))
