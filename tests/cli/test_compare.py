"""``compare``: same data, budget and start; the table is that of the runs."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from hyperopt_peft.cli.compare import table
from hyperopt_peft.cli.text.data import DataArguments
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import prepare
from hyperopt_peft.problems import DoRA, LoRA
from tests.support.cli import refused, run, small_run

METHODS = ["lora", "dora", "bidora"]


def test_the_table_is_that_of_runs_of_one_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"target_modules": ["query"], "retrain_arguments": {"max_steps": 3}, "gamma": 0.1}
    changes["hypergradient"] = "cg:steps=2,damping=1.0"
    run("compare", **small_run(tmp_path, methods=METHODS, seeds=[0, 1, 0], **changes))
    folder = tmp_path / "out"
    record = json.loads((folder / "comparison.json").read_text())
    assert [(each["method"], each["seed"]) for each in record["runs"]] == [
        (method, seed) for seed in (0, 1) for method in METHODS
    ]
    # Four steps each, and of bidora in each phase. Two upper steps come on top, each with ∂F, two
    # products and a mixed one.
    passes = {each["method"]: each["passes"] for each in record["runs"]}
    assert passes["lora"] == passes["dora"] == 4
    assert passes[METHODS[2]] >= 4 + 4 + 2 * 4
    text = capsys.readouterr().out.partition("\nmethod ")[2]
    assert "2 seeds on 10 rows" in text and record["test_rows"] == 10
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    for method in METHODS:
        runs = [each for each in record["runs"] if each["method"] == method]
        mean = statistics.fmean(each["metrics"]["accuracy"] for each in runs)
        assert f"{mean:.4f}" in lines[method]
    assert "runtime" not in text and "per_second" not in text
    assert {path.name for path in folder.iterdir()} == {"comparison.json", "report.md"}


def test_one_seed_is_one_start_and_models_leave_the_options_as_they_are(tmp_path: Path) -> None:
    options = small_run(tmp_path)
    args = ModelArguments(options["model"], options["task"], rank=2, modules_to_save=["pooler"])
    setup = prepare(args, DataArguments([options["train_file"]], max_length=16), None)
    models = [setup.model(0, LoRA()), setup.model(0, DoRA()), setup.model(1, DoRA())]
    lora, dora, other = (
        {n: p.detach() for n, p in model.named_parameters() if "magnitude" not in n}
        for model in models
    )
    assert lora.keys() == dora.keys() and any("lora_A" in name for name in lora)
    for name, weight in lora.items():
        assert torch.equal(weight, dora[name])
        assert "lora_A" not in name or not torch.equal(weight, other[name])
    saved = [model.peft_config["default"].modules_to_save for model in models]
    assert saved[0] == saved[1] and "pooler" in saved[0] and args.modules_to_save == ["pooler"]


def test_a_table_by_hand() -> None:
    runs = [
        {"method": name, "seed": seed, "metrics": {"m": value}, "passes": 7, "seconds": 2.0}
        for seed, values in enumerate([{"a": 1.0, "b": 4.0}, {"a": 3.0, "b": 6.5}])
        for name, value in values.items()
    ]
    assert table(runs, "m") == [
        ["method", "m", "difference to a", "passes", "seconds"],
        ["a", "2.0000 ± 1.0000", "–", "7", "2.0"],
        ["b", "5.2500 ± 1.2500", "+3.2500 ± 0.2500", "7", "2.0"],
    ]


def test_bad_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "compare", small_run(tmp_path, eval_fraction=0, eval_file=None), "eval_file")
    refused(capsys, "compare", small_run(tmp_path, seeds=-3), r"seed must be .*got -3")
