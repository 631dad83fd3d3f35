"""``--dry-run`` says what training then does, and does nothing itself."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hyperopt_peft import ProblemError
from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.plan import saved_bytes
from hyperopt_peft.cli.text.models import require_targets
from hyperopt_peft.hypergradients import get_estimator, registered
from tests.support.cli import failure, given, state
from tests.support.files import flags


def plan(capsys: pytest.CaptureFixture[str], options: dict[str, Any]) -> str:
    assert main(["train", *flags(**options), "--dry-run"]) == 0
    return capsys.readouterr().out


def numbers(text: str, line: str) -> list[int]:
    (found,) = re.findall(rf"^{line}: (.*)$", text, re.MULTILINE)
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\b", found)]


def test_who_owns_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, given(tmp_path, target_modules=["query", "value"]))
    # Four 8 × 8 layers of rank 2; a head of 3 × 8 and 3; BERT's 50 + 512 + 2 embeddings and so on.
    assert numbers(text, "upper level, magnitudes") == [4 * 8, 4]
    assert numbers(text, "lower level, directions") == [4 * 2 * 16, 8]
    assert numbers(text, "lower level, head") == [27, 2]
    embeddings, layer = (50 + 512 + 2 + 2) * 8, 4 * 72 + 16 + (8 * 12 + 12) + (12 * 8 + 8) + 16
    assert "\nlabels: a, b, c\n" in text
    assert numbers(text, "frozen")[0] == embeddings + 2 * layer + 72 + 27
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("retrain", ["warm", "none"])
def test_steps_are_those_that_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], retrain: str
) -> None:
    epochs: dict[str, Any] = {
        "max_steps": -1,
        "num_train_epochs": 1.5,
        "retrain_epochs": 2,
        "lower_steps": 3,
    }
    options = given(tmp_path, retrain=retrain, gradient_accumulation_steps=2, **epochs)
    text = plan(capsys, options)
    search, upper, again = numbers(text, "steps")
    lower_rows, upper_rows, retrained, evaluated = numbers(text, "examples")
    assert (lower_rows, upper_rows, evaluated) == (19, 5, 10)
    assert retrained == (24 if retrain == "warm" else 0)
    assert search == math.ceil(1.5 * math.ceil(math.ceil(19 / 4) / 2)) == 5
    assert upper == 1
    assert main(["train", *flags(**options)]) == 0
    trained = state(tmp_path / "out")
    assert trained["global_step"] == search
    assert sum("upper_loss" in record for record in trained["log_history"]) == upper
    if retrain == "warm":
        assert state(tmp_path / "out/retrain")["global_step"] == again == 6
    else:
        assert again == 0


def test_a_control_has_one_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, given(tmp_path, method="lora", target_modules=["query"]))
    assert numbers(text, "one level, all of the adapter") == [2 * 2 * 16 + 27, 6]
    assert numbers(text, "examples") == [24, 10]
    assert numbers(text, "steps") == [4]
    assert "vectors" not in text


def test_too_few_steps_are_refused_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = given(tmp_path, lower_steps=5)
    messages = [failure(capsys, "train", *flags(**options), *dry) for dry in ([], ["--dry-run"])]
    assert messages[0] == messages[1]
    assert "lower_steps" in messages[0]


def test_new_weights_that_stay_random_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # A token classifier has no pooler; the text classifier that is made of it has a new one.
    options = {**given(tmp_path, "token-classification"), "task": "text-classification"}
    again = given(tmp_path / "other")
    options |= {name: again[name] for name in ("train_file", "eval_file")}
    options.pop("label_column")
    options["target_modules"] = ["query"]
    plan(capsys, {**options, "modules_to_save": ["pooler"]})
    assert "bert.pooler" not in caplog.text
    plan(capsys, options)
    assert "bert.pooler.dense.bias, bert.pooler.dense.weight" in caplog.text
    assert "modules_to_save" in caplog.text


def test_memory_adds_up_and_has_the_estimators_own_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = given(tmp_path, target_modules=["query"])
    memory = {}
    for method in ("darts", "cg:steps=2", "cg:steps=2,product=difference"):
        text = plan(capsys, {**options, "hypergradient": method}).split("memory: ")[1]
        total, *parts = (float(n) for n in re.findall(r"([\d.]+) kB", text))
        assert sum(parts) == pytest.approx(total, abs=0.3)
        memory[method] = parts
        estimator = get_estimator(method)
        cost = estimator.cost()
        assert cost is not None and f"{cost.vectors} vectors" in text
        assert ("again" in text) == estimator.requirements.second_derivatives
    assert memory["cg:steps=2"][2] == pytest.approx(memory["cg:steps=2"][4], abs=0.1)


# A small network's Hessian is singular, which no dry run can know.
NAMES = ["exact:damping=10" if name == "exact" else name for name in registered()]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_dry_run_accepts_is_trained(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = given(
        tmp_path, target_modules=["query"], retrain="none", hypergradient=name, eval_fraction=0
    )
    del options["eval_file"]
    ends = [main(["train", *flags(**options), *dry]) for dry in (["--dry-run"], [])]
    assert ends[0] == ends[1]
    assert ends[0] == 0 or name in capsys.readouterr().err


def test_too_many_unknowns_for_exact_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperopt_peft.hypergradients.implicit.exact.LARGEST", 10)
    options = given(tmp_path, hypergradient="exact")
    for dry in ([], ["--dry-run"]):
        assert "unknowns" in failure(capsys, "train", *flags(**options), *dry)
    assert not (tmp_path / "out/checkpoint-2").exists()


def test_saved_bytes_of_a_graph() -> None:
    w, x = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    # x for the gradient of w; the product (5, 3) for the sine; nothing for the sum.
    assert saved_bytes(lambda: (x @ w.T).sin().sum(), [w]) == 4 * (5 * 4 + 5 * 3)
    assert saved_bytes(lambda: (x @ w.T).sum(), [w, x]) == 0


def test_a_model_without_layers_to_adapt_is_refused() -> None:
    with pytest.raises(ProblemError, match="Sequential"):
        require_targets(nn.Sequential(nn.LayerNorm(3), nn.ReLU()), ["all-linear"])
