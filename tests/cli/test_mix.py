"""``mix``: weights, what other trainers read, and a comparison; errors are named."""

import json
import re
import shlex
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftConfig

from hyperopt_peft.cli import mix
from hyperopt_peft.problems.compare_baselines import MethodResult
from hyperopt_peft.problems.mix_baselines import Baselines
from hyperopt_peft.problems.mix_plans import (
    LEARNED,
    LEARNED_THEN,
    SOURCES_ALIKE,
    THEN_TRUSTED,
    TRUSTED_ONLY,
)
from tests.support.cli import refused, run, small_run
from tests.support.files import flags, rows, write
from tests.support.mix_runs import trainer
from tests.support.trainers import values


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two sources of 24 rows in files, the labels of one of them swapped."""
    labels = sorted({row["label"] for row in rows()})
    swapped = [
        {**row, "label": labels[(labels.index(row["label"]) + 1) % len(labels)]}
        for row in rows(seed=5)
    ]
    files = {
        "web": write(folder / "web.jsonl", rows()),
        "swapped": write(folder / "swapped.jsonl", swapped),
    }
    trusted = write(folder / "trusted.jsonl", rows(number=12, seed=7))
    data = {
        "sources": yaml.safe_dump(files, sort_keys=False),
        "trusted_file": trusted,
        "baseline_folds": 0,
    }
    small: dict[str, Any] = {"max_steps": 4, "retrain_steps": 2, "target_modules": ["query"]}
    small["gradient_accumulation_steps"] = 2
    return small_run(folder, **{"train_file": None, "eval_file": None, **data, **small, **changes})


def test_everything_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    test = write(tmp_path / "test.jsonl", rows()[:6] + rows(number=4, seed=8))
    run("mix", **options(tmp_path, test_file=test, baseline_folds=2))
    assert "6 of 10 test examples are in a source too" in caplog.text
    verdict = json.loads((tmp_path / "out/weights.json").read_text())
    sources = verdict["sources"]
    assert list(sources) == ["web", "swapped", "trusted"]
    assert sum(source["share"] for source in sources.values()) == pytest.approx(1)
    assert sources["web"]["rows"] == sources["swapped"]["rows"] == 24
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == "LORA"
    mixture = {p.stem: yaml.safe_load(p.read_text()) for p in tmp_path.glob("out/mixture/*")}
    files = [entry["data_files"] for entry in mixture["trl"]["datasets"]]
    assert [Path(file).name for file in files] == ["web.jsonl", "swapped.jsonl"]
    ratio = sources["swapped"]["row_weight"] / sources["web"]["row_weight"]
    fractions = [entry["fraction"] for entry in mixture["trl"]["datasets"]]
    kept = [entry["weight"] for entry in mixture["axolotl"]["datasets"]]
    drawn = [float(x) for x in mixture["llama-factory"]["interleave_probs"].split(",")]
    for web, swapped in (fractions, kept, drawn):
        assert swapped / web == pytest.approx(ratio)
    printed = capsys.readouterr().out
    assert re.search(r"source +rows +share", printed) and LEARNED in printed
    assert "eval_loss" in printed
    assert (tmp_path / "out/weights.png").stat().st_size > 10_000
    losses = [method["trusted_loss"] for method in verdict["methods"]]
    assert losses == sorted(losses) and len(losses) > 9
    assert verdict["recommended"] == verdict["saved"]
    assert verdict["recommended"] in {method["method"] for method in verdict["methods"]}
    assert verdict["sentence"] in printed and verdict["upper_steps"] == 15
    assert all(len(each["row_weight_of_folds"]) == 2 for each in verdict["sources"].values())
    assert all(warning in printed for warning in verdict["warnings"])
    page = unescape((tmp_path / "out/report.html").read_text())
    (command,) = re.findall(r"<pre>(hyperopt-peft mix.*?)</pre>", page, re.DOTALL)
    given = flags(**options(tmp_path, test_file=test, baseline_folds=2))
    assert shlex.split(command.replace("\\\n", ""))[2:] == given
    assert "data:image/png" in page and "over the folds" in page
    assert all(f"<td>{name}</td>" in page for name in sources)


def test_sources_in_a_column(tmp_path: Path) -> None:
    named = [{**row, "origin": "uv"[k % 2]} for k, row in enumerate(rows())]
    column = {"sources": None, "source_column": "origin"}
    run("mix", **options(tmp_path, train_file=write(tmp_path / "all.jsonl", named), **column))
    sources = json.loads((tmp_path / "out/weights.json").read_text())["sources"]
    counts = {name: source["rows"] for name, source in sources.items()}
    assert counts == {"u": 12, "v": 12, "trusted": 12}
    assert not (tmp_path / "out/mixture").exists()


def test_the_picture_of_a_resumed_search_has_every_upper_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(mix, "draw_shares", lambda shares, path: drawn.append(shares))
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    chosen = options(tmp_path, search="adapter", retrain="none", **saves)
    run("mix", **chosen)
    shutil.rmtree(tmp_path / "out/checkpoint-6")
    run("mix", **chosen, resume_from_checkpoint=True)
    whole, resumed = drawn
    assert len(whole) == 4 and resumed == whole  # before the first of 3 updates, and after each
    assert whole[0] == pytest.approx({"web": 0.4, "swapped": 0.4, "trusted": 0.2})
    sources = json.loads((tmp_path / "out/weights.json").read_text())["sources"]
    assert whole[3] == {name: source["share"] for name, source in sources.items()} != whole[2]


@pytest.mark.parametrize(
    ("search", "method"),
    [
        *(("adapter", method) for method in (TRUSTED_ONLY, LEARNED_THEN)),
        *(("head", method) for method in (SOURCES_ALIKE, THEN_TRUSTED, LEARNED_THEN)),
    ],
)
def test_the_trained_adapter_is_that_of_the_chosen_method(
    tmp_path: Path, search: str, method: str
) -> None:
    made = trainer(tmp_path, search=search, retrain_steps=4)
    mix.search(made, None)
    setting = 4.0 if search == "adapter" else 1.0
    chosen = MethodResult(method, torch.zeros(30), passes=1, setting=setting)
    mix.train(made, chosen, False)
    trained = values(made.model)
    with Baselines(made) as baselines:
        baselines.train(method, 4, made.data)
        for name, value in values(made.model).items():
            assert torch.allclose(value, trained[name], atol=1e-4), name


def test_doubts_are_named(tmp_path: Path) -> None:
    made = trainer(tmp_path, search="head", search_steps=3, upper_learning_rate=0.1)
    losses = torch.tensor([0.9, 1.1, 1.3])
    found = mix.doubts(made, 3) + mix.hardly_learned(made, losses, losses * 0.99)
    for words in ("3 updates", "upper_learning_rate 0.1", "hardly learned"):
        assert words in " ".join(found)
    made.args.upper_learning_rate = 0.6
    assert mix.doubts(made, 15) + mix.hardly_learned(made, losses, losses / 2) == []


def test_without_a_final_training_the_saved_adapter_is_the_learned_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"baseline_folds": 2, "equal_passes": False, "learning_rate": 1e-6}
    run("mix", **options(tmp_path, search="adapter", retrain="none", **short))
    verdict, printed = json.loads((tmp_path / "out/weights.json").read_text()), capsys.readouterr()
    assert verdict["saved"] == LEARNED and f"the saved adapter: {LEARNED}" in printed.out
    few, rate, fall = verdict["warnings"]
    assert "2 updates" in few and "upper_learning_rate" in rate and "hardly learned" in fall
    assert all(f"warning: {warning}" in printed.out for warning in verdict["warnings"])


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_the_comparison_says_what_it_takes(tmp_path: Path, strategy: str) -> None:
    made = trainer(tmp_path, search="adapter", retrain_steps=4, save_strategy=strategy)
    command = mix.MixArguments(trusted_file=["trusted.csv"], baseline_folds=2)
    baselines = Baselines(made)
    work = mix.comparison_work(baselines, command)
    seconds = 60.0 * baselines.passes / (work.trainings * work.passes)
    text = mix.estimate(made, command, 10 * seconds)
    assert f"{work.trainings} trainings" in text and "10 minutes" in text
    assert ("resume_from_checkpoint" in text) == (strategy == "steps")
    assert "about" not in mix.estimate(made, command, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trusted_file": None}, "trusted_file: give"),
        ({"trusted_file": "none.jsonl"}, "trusted_file: there is no file none.jsonl"),
        ({"trusted_file": "{folder}/web.jsonl"}, "24 of 24 rows are in a source too"),
        ({"test_file": "none.jsonl"}, "test_file: there is no file none.jsonl"),
        ({"sources": None}, "sources: give either the files of each source"),
        ({"sources": "web.jsonl"}, "sources: must map names"),
        ({"sources": "{{a: a.jsonl, b: b.jsonl}}"}, "sources: there is no file a.jsonl"),
        ({"sources": "{{web: {folder}/web.jsonl}}"}, "two or more"),
        ({"source_column": "origin"}, "sources: give either"),
        ({"baseline_folds": 1}, "baseline_folds: must be 0, or from 2 to the 12 rows .*got 1"),
        ({"baseline_folds": 100}, "baseline_folds: .*got 100"),
        ({"eval_file": "any.jsonl"}, "eval_file: an option of train, compare"),
        ({"weight_column": "w"}, "weight_column: an option of train, compare"),
    ],
)
def test_bad_options_are_named_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    formatted = {
        name: value.format(folder=tmp_path) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    refused(capsys, "mix", options(tmp_path, **formatted), words)
    assert not (tmp_path / "out/adapter_config.json").exists()
