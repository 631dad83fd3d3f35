"""``compare``: same data, budget and start; the table is that of the runs."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperopt_peft.cli import compare
from hyperopt_peft.cli.compare import MethodRun, arguments_of, bootstrap, table
from hyperopt_peft.cli.text.data import DataArguments
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import MethodArguments, prepare
from tests.support.cli import refused, run, small_run

METHODS = ["lora", "dora", "bidora:cg:steps=2,damping=1.0"]


def test_the_table_is_that_of_runs_of_one_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "DRAWS", 10)
    changes = {"target_modules": ["query"], "retrain_arguments": {"max_steps": 3}}
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
    assert f"2 seeds on {record['test_rows']} test rows" in text and record["test_rows"] == 10
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    for method in METHODS:
        runs = [each for each in record["runs"] if each["method"] == method]
        for name in ("eval_accuracy", "eval_macro_f1", "eval_loss"):
            mean = statistics.fmean(each["metrics"][name] for each in runs)
            assert f"{mean:.4f}" in lines[method]
    assert "runtime" not in text and "per_second" not in text
    assert not list(folder.rglob("checkpoint-*"))
    assert (folder / "comparison.png").stat().st_size > 10_000


def test_one_seed_is_one_start_and_models_leave_the_options_as_they_are(tmp_path: Path) -> None:
    options = small_run(tmp_path)
    args = ModelArguments(options["model"], options["task"], rank=2, modules_to_save=["pooler"])
    setup = prepare(args, DataArguments([options["train_file"]], max_length=16))
    models = {
        name: setup.model(seed, dora=dora)
        for name, seed, dora in (("lora", 0, False), ("dora", 0, True), ("other", 1, True))
    }
    weights = {
        name: {n: p.detach() for n, p in model.named_parameters() if "magnitude" not in n}
        for name, model in models.items()
    }
    assert weights["lora"].keys() == weights["dora"].keys()
    for name, weight in weights["lora"].items():
        assert torch.equal(weight, weights["dora"][name])
        if "lora_A" in name:
            assert not torch.equal(weight, weights["other"][name])
    assert any("lora_A" in name for name in weights["lora"])
    saved = [model.peft_config["default"].modules_to_save for model in models.values()]
    assert saved[0] == saved[1] and "pooler" in saved[0] and args.modules_to_save == ["pooler"]


def test_bootstrap_is_the_binomial_error() -> None:
    labels = np.zeros(400, dtype=int)
    predictions = (np.arange(400) % 5 == 0).astype(int)  # a fifth is wrong
    draws = bootstrap(
        lambda rows: float((rows.predictions == rows.label_ids).mean()), predictions, labels
    )
    assert draws.std() == pytest.approx((0.8 * 0.2 / 400) ** 0.5, rel=0.15)


def test_a_table_by_hand() -> None:
    draws = np.array([0.0, 2.0])
    runs = [
        MethodRun("a", 0, {"m": 1.0, "eval_loss": 0.5}, 2.0, 7, draws),
        MethodRun("b", 0, {"m": 4.0, "eval_loss": 0.25}, 1.0, 7, draws + 3),
        MethodRun("a", 1, {"m": 3.0, "eval_loss": 0.7}, 4.0, 7, draws),
    ]
    # The error of a: √(s²/2 + 1²) with s² = 2. On the same rows and the same seed b is 3 better in
    # every draw, so that no error of the rows is left.
    assert table(runs, "m", 40)[0] == [
        ["method", "m", "difference to a", "loss", "passes", "seconds"],
        ["a", "2.0000 ± 1.4142", "–", "0.6000", "7", "3.0"],
        ["b", "4.0000 ± 1.0000", "+3.0000 ± 0.0000", "0.2500", "7", "1.0"],
    ]


def test_a_method_may_name_its_estimator(tmp_path: Path) -> None:
    args = MethodArguments(str(tmp_path), hypergradient="darts", xi=0.1, use_cpu=True)
    assert arguments_of("bidora", args).estimator().xi == 0.1
    settings = arguments_of("bidora:cg:steps=3", args)
    assert (settings.method, settings.estimator().steps) == ("bidora", 3)
    assert (args.xi, args.save_strategy) == (0.1, "steps")  # unchanged


def test_a_seed_out_of_range_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "compare", small_run(tmp_path, seeds=[0, -3]), r"seeds must be .*got -3")


def test_no_evaluation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "compare", small_run(tmp_path, eval_fraction=0, eval_file=None), "eval_file")
