"""``--method``: every name trains, a class of a file too, and what cannot be one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from hyperopt_peft.cli.main import main
from hyperopt_peft.problems import METHODS
from tests.support.cli import refused, run, small_run
from tests.support.files import rows, write

MINE = '''
from __future__ import annotations
from dataclasses import dataclass, field
from types import MappingProxyType
from hyperopt_peft import Estimator, Method, register
from hyperopt_peft.problems.baselines import LoRA

@dataclass
class Mine(Method):
    """Learns the bias of the head.

    Args:
        weight: of the squares of the weights.
    """

    weight: float = 0.1
    defaults = MappingProxyType({"hypergradient": "direct", "lower_steps": 1})

    def upper_variables(self, model):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return {n: p for n, p in named if "classifier" in n and "bias" in n}

    def lower_loss(self, model, batch, task_loss):
        return task_loss(batch) + self.weight * sum(p.square().sum() for p in model.parameters())

class Plain(LoRA):
    """A baseline without options."""

@dataclass
class Clash(LoRA):
    learning_rate: float = 1.0

@dataclass
class Unknown(LoRA):
    defaults = {"lerning_rate": 1.0}

@dataclass
class Odd(LoRA):
    either: int | float = 1

class Other:
    pass
'''
PLUGIN = """
from hyperopt_peft.hypergradients.unrolled.direct import Direct
from hyperopt_peft import register

@register("mine", kind="direct")
class Mine(Direct):
    pass
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


@pytest.mark.parametrize("name", METHODS)
def test_every_name_trains(tmp_path: Path, name: str) -> None:
    trusted = write(tmp_path / "trusted.jsonl", rows(number=8, seed=5))
    data = [{**row, "source": "ab"[k % 2], "weight": 1.0} for k, row in enumerate(rows())]
    changes: dict[str, Any] = {"train_file": write(tmp_path / "all.jsonl", data)}
    run("train", **small_run(tmp_path, method=name, upper_file=trusted, **changes))
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert results["train_loss"] > 0 and results["eval_accuracy"] >= 0
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == "LORA"


def test_a_class_of_a_file_with_its_options(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of YAML too; its defaults are those of the run, which the user overrides."""
    method = f"{file}:Mine"
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"weight": 0.5, "gamma": 3}))
    options = small_run(tmp_path, method=method, lower_steps=None)
    run("train", str(config), "--dry_run", **options)
    printed = capsys.readouterr()
    assert "method: Mine(weight=0.5)" in printed.out and "direct, for 4 updates" in printed.out
    assert "gamma: of other commands, tasks or methods" in printed.err
    run("train", **options, weight="1e-3", hypergradient="cg:steps=2")
    settings = json.loads((tmp_path / "out/bilevel_settings.json").read_text())
    assert settings["hypergradient"] == "cg:steps=2"
    assert "--weight 1e-3" in (tmp_path / "out/report.md").read_text()
    assert main(["train", "--method", method, "--help"]) == 0
    assert "of the squares of the weights" in capsys.readouterr().out
    run("train", **{**options, "method": f"{file}:Plain", "overwrite_output_dir": True})
    run("check", **options, estimators="none", solver_steps=2)
    del options["method"]
    options |= {"methods": ["lora", method], "weight": 2, "seeds": 0, "output_dir": tmp_path / "2"}
    run("compare", **options)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Clash", "Clash: its field learning_rate is an argument of every run; rename it"),
        ("Unknown", "Unknown: defaults has lerning_rate, which is no argument"),
        ("Odd", "Odd: a field of it cannot be an option"),
        ("Other", "mine.py has no class Other that is a hyperopt_peft.Method"),
        ("Nothing", "mine.py has no class Nothing"),
    ],
)
def test_a_class_that_is_no_method_of_the_command_line(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    refused(capsys, "train", small_run(tmp_path, method=f"{file}:{name}"), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "bidorra"}, "method: unknown 'bidorra'; did you mean 'bidora'"),
        ({"method": "none.py:Mine"}, "method: none.py is no file of Python"),
        ({"method": "lora", "gamma": 1}, "--gamma: an option of bidora.*leave it out"),
        ({"gamma": -1}, "gamma: must be finite and not negative"),
        ({"plugin": "none.py"}, "plugin: none.py is no file of Python"),
        ({"hypergradient": "mine2"}, "unknown estimator 'mine2'"),
    ],
)
def test_bad_methods_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    refused(capsys, "train", small_run(tmp_path, **changes), words)


def test_a_file_that_fails_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module")
    changes = {"method": f"{tmp_path}/broken.py:Mine"}
    refused(capsys, "train", small_run(tmp_path, **changes), "broken.py cannot be imported: Mod")


def test_a_plugin_registers_an_estimator_first(tmp_path: Path) -> None:
    path = tmp_path / "estimators.py"
    path.write_text(PLUGIN)
    run("train", **small_run(tmp_path, plugin=path, hypergradient="mine", retrain="none"))
    run("check", **small_run(tmp_path, plugin=path, dry_run=True, estimators="mine"))
