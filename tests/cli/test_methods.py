"""``--method``: every name trains, a class of a file too, and what cannot be one is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from hyperopt_peft.cli.main import main
from hyperopt_peft.comparison import METHODS
from tests.support.cli import Capture, refused, results_of, run, small_run
from tests.support.files import rows, write

MINE = '''
from __future__ import annotations
from dataclasses import dataclass
from hyperopt_peft.method import Method, option
from hyperopt_peft.problems import LoRA

@dataclass
class Mine(Method):
    """Learns the bias of the head."""

    weight: float = option(0.1, help="of the squares of the weights")
    defaults = {"hypergradient": "direct", "lower_steps": 1}

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

class Other:
    pass
'''
ESTIMATOR = """
from hyperopt_peft.hypergradients import Direct, register

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
    results = results_of(tmp_path)
    assert results["train_loss"] > 0 and results["eval_accuracy"] >= 0
    assert PeftConfig.from_pretrained(tmp_path / "out").peft_type == "LORA"


@pytest.mark.parametrize("by", ["files", "column"])
def test_sources_are_files_or_a_column(tmp_path: Path, capsys: Capture, by: str) -> None:
    parts = [
        write(tmp_path / f"{name}.csv", rows(number=12, seed=k)) for k, name in enumerate("ab")
    ]
    data = [{**row, "origin": "xyz"[k % 3]} for k, row in enumerate(rows())]
    changes: dict[str, Any] = {"train_file": parts, "eval_file": None, "eval_fraction": 0.2}
    if by == "column":
        changes = {"train_file": write(tmp_path / "all.csv", data), "column": "origin"}
    trusted = write(tmp_path / "trusted.csv", rows(number=8, seed=5))
    run("train", **small_run(tmp_path, method="sources", upper_file=trusted, **changes))
    names = parts if by == "files" else ["x", "y", "z"]
    shares = re.findall(r"(\S+) (0\.\d+)", capsys.readouterr().out.partition("; shares ")[2])
    assert {name for name, _ in shares} == {*names, "trusted"}
    assert sum(float(share) for _, share in shares) == pytest.approx(1, abs=2e-3)


def test_given_weights_are_those_of_attribution(tmp_path: Path, capsys: Capture) -> None:
    """Of 1 they change nothing, of 0 they leave rows out."""
    losses = {}
    for weights in ([1.0] * 24, [1.0, 0.0] * 12, [-1.0] * 24):
        data = [{**row, "weight": weight} for row, weight in zip(rows(), weights)]
        options = small_run(tmp_path, method="given_weights", train_file=None, max_steps=2)
        options |= {"train_file": write(tmp_path / "w.csv", data), "overwrite_output_dir": True}
        if weights[0] < 0:
            refused(capsys, "train", options, r"row 0 \(from 0\) of 'weight' is -1")
            continue
        run("train", **options)
        losses[weights[1]] = results_of(tmp_path)["eval_loss"]
    run("train", **{**options, "method": "lora"})
    plain = results_of(tmp_path)["eval_loss"]
    assert losses[1.0] == pytest.approx(plain, rel=1e-4) != pytest.approx(losses[0.0], rel=1e-4)


def test_a_class_of_a_file_with_its_options(tmp_path: Path, file: str, capsys: Capture) -> None:
    """Of YAML too; its defaults are those of the run, which the user overrides."""
    method = f"{file}:Mine"
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"weight": 0.5, "gamma": 3}))
    options = small_run(tmp_path, method=method, lower_steps=None)
    run("train", str(config), "--dry_run", **options)
    printed = capsys.readouterr()
    assert "method: Mine(weight=0.5)" in printed.out and "direct, for 4 updates" in printed.out
    run("train", **options, weight="1e-3", hypergradient="cg:steps=2")
    settings = json.loads((tmp_path / "out/bilevel_settings.json").read_text())
    assert settings["hypergradient"] == "cg:steps=2"
    assert "--weight 1e-3" in (tmp_path / "out/report.html").read_text()
    assert main(["train", "--method", method, "--help"]) == 0
    assert "of the squares of the weights" in capsys.readouterr().out
    run("train", **{**options, "method": f"{file}:Plain", "overwrite_output_dir": True})
    del options["method"]
    options |= {"methods": ["lora", method], "weight": 2, "output_dir": tmp_path / "2"}
    run("compare", **options, seeds=[0, 1], passes=20, rates=3e-2, upper_rates=1e-2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "mine.py:Clash"}, "Clash: a field of it cannot be an .*--learning_rate"),
        ({"method": "mine.py:Unknown"}, "Unknown: lerning_rate in defaults is no option"),
        ({"method": "mine.py:Other"}, "no Method 'Other'; give .*Class; known are Clash, .*Mine"),
        ({"method": "mine.py:Min"}, "mine.py has no Method 'Min'; .* did you mean 'Mine'"),
        ({"method": "mine.py"}, "mine.py has no Method ''; give .*/mine.py:Class; known are Clash"),
        ({"method": "broken.py:Mine"}, "broken.py cannot be imported: Mod"),
        ({"method": "none.py:Mine"}, "method: .*none.py is no file of Python"),
        ({"method": "bidorra"}, "method: unknown 'bidorra'; did you mean 'bidora'"),
        ({"method": "lora", "gamma": 1}, "--gamma: is for bidora.*leave it out"),
        ({"gamma": -1}, "gamma must be finite float ≥ 0"),
        ({"hypergradient": "none.py:A"}, "hypergradient: none.py is no file of Python"),
    ],
)
def test_bad_methods_are_one_line(
    file: str, capsys: Capture, changes: dict[str, Any], words: str
) -> None:
    folder = Path(file).parent
    (folder / "broken.py").write_text("import no_such_module")
    if ".py" in changes.get("method", ""):
        changes = {"method": f"{folder}/{changes['method']}"}
    refused(capsys, "train", small_run(folder, **changes), words)


def test_an_estimator_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "estimators.py"
    path.write_text(ESTIMATOR)
    run("train", **small_run(tmp_path, hypergradient=f"{path}:Mine", retrain="none"))
