"""``--dry_run`` says what training then does, and does nothing itself."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Capture, run, small_run, state
from tests.support.files import save_model


def plan(capsys: Capture, options: dict[str, Any], command: str = "train") -> str:
    run(command, "--dry-run", **options)
    return capsys.readouterr().out


def numbers(text: str, line: str) -> list[int]:
    (rest,) = re.findall(rf"^{line}: (.*)$", text, re.MULTILINE)
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\b", rest)]


def steps(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"^\w+ +1 +(\d+)$", text, re.MULTILINE)]


def test_who_owns_what(tmp_path: Path, capsys: Capture) -> None:
    text = plan(capsys, small_run(tmp_path, target_modules=["query", "value"]))
    # Magnitudes and directions of four 8 × 8 layers of rank 2, and a head of 3 × 8 and 3.
    assert numbers(text, "parameters") == [4 * 8, 4 * 2 * 16 + 27]
    assert "\nlabels: a, b, c\n" in text and not (tmp_path / "out").exists()
    text = plan(capsys, small_run(tmp_path, method="lora", target_modules=["query"]))
    assert numbers(text, "parameters") == [2 * 2 * 16 + 27]
    assert numbers(text, "examples") == [24, 10] and steps(text) == [4]


def test_steps_are_those_that_are_trained(tmp_path: Path, capsys: Capture) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 1.5, "lower_steps": 3}
    again = {"retrain_arguments": {"num_train_epochs": 2}, "gradient_accumulation_steps": 2}
    options = small_run(tmp_path, **epochs, **again)
    text = plan(capsys, options)
    assert numbers(text, "examples") == [19, 5, 24, 10] and "for 1 updates" in text
    run("train", **options)
    trained = state(tmp_path / "out")
    assert trained["global_step"] == steps(text)[0] == math.ceil(1.5 * math.ceil(19 / 8)) == 5
    assert sum("upper_loss" in record for record in trained["log_history"]) == 1
    assert state(tmp_path / "out/retrain")["global_step"] == steps(text)[1] == 6
    text = plan(capsys, {**options, "retrain": "none"})
    assert len(steps(text)) == 1 and numbers(text, "examples")[2] == 0


def test_new_weights_that_stay_random_are_warned_of(
    tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    # A token classifier has no pooler; the text classifier that is made of it has a new one.
    model = save_model(tmp_path / "tokens", "token-classification")
    options = small_run(tmp_path, model=model, target_modules=["query"])
    plan(capsys, {**options, "modules_to_save": ["pooler"]})
    assert "bert.pooler" not in caplog.text
    plan(capsys, options)
    assert "bert.pooler.dense.bias, bert.pooler.dense.weight" in caplog.text


@pytest.mark.parametrize(
    ("command", "changes", "trainings"),
    [
        (
            "compare",
            {"seeds": [0, 1], "methods": ["lora", "bidora"]},
            {"lora": "20 +2", "bidora": "36 +2"},
        ),
        ("attribute", {"check": 5, "suspects": 3}, {"training": 1, "check": 6, "suspects": 3}),
    ],
)
def test_every_command_says_its_trainings(
    tmp_path: Path,
    capsys: Capture,
    command: str,
    changes: dict[str, Any],
    trainings: dict[str, int | str],
) -> None:
    text = plan(capsys, small_run(tmp_path, target_modules=["query"], **changes), command)
    for name, count in trainings.items():
        assert re.search(rf"^{name} +{count}\b", text, re.MULTILINE), text
    assert not (tmp_path / "out").exists()
