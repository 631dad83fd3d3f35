"""``compare``: same data, budget and start; the table is what the runs found."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hyperopt_peft import ProblemError
from hyperopt_peft.cli.compare_methods import CompareArguments, arguments_of
from hyperopt_peft.cli.comparison import Run, bootstrap, markdown, mean_and_error, summarise
from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.text.data import DataArguments
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import MethodArguments, prepare
from tests.support.cli import NOWHERE, failure, given
from tests.support.files import flags

Compared = tuple[Path, dict[str, Any]]
METHODS = ["lora", "dora", "bidora", "bidora:cg:steps=2,damping=1.0"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder = tmp_path_factory.mktemp("compare")
    options = given(folder, methods=METHODS, seeds=[0, 1], retrain_steps=3)
    assert main(["compare", *flags(**options)]) == 0
    return folder / "out", json.loads((folder / "out/comparison.json").read_text())


def test_every_method_has_the_same_budget(compared: Compared) -> None:
    _, record = compared
    assert [(run["method"], run["seed"]) for run in record["runs"]] == [
        (method, seed) for seed in (0, 1) for method in METHODS
    ]
    assert {run["steps"] for run in record["runs"]} == {4 + 3}


def test_the_table_is_what_the_runs_found(compared: Compared) -> None:
    folder, record = compared
    table = (folder / "comparison.md").read_text()
    assert f"2 seeds on {record['test_rows']} test rows" in table and record["test_rows"] == 10
    found = {
        method: [run["metrics"] for run in record["runs"] if run["method"] == method]
        for method in METHODS
    }
    for row in record["methods"]:
        for name in ("eval_accuracy", "eval_macro_f1", "eval_loss"):
            values = [metrics[name] for metrics in found[row["method"]]]
            assert row["metrics"][name] == pytest.approx(statistics.fmean(values))
            assert f"{row['metrics'][name]:.4f}" in table
        values = [metrics["eval_accuracy"] for metrics in found[row["method"]]]
        assert row["spread"] == pytest.approx(statistics.stdev(values))
        if row["method"] != METHODS[0]:
            first = [metrics["eval_accuracy"] for metrics in found[METHODS[0]]]
            differences = [a - b for a, b in zip(values, first, strict=True)]
            assert row["difference"] == pytest.approx(statistics.fmean(differences))
    trainable = {row["method"]: row["trainable_parameters"] for row in record["methods"]}
    assert trainable["dora"] == trainable["bidora"] > trainable["lora"]
    assert "runtime" not in table and "per_second" not in table


def test_a_picture_and_no_checkpoints(compared: Compared) -> None:
    folder, _ = compared
    assert (folder / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.rglob("checkpoint-*"))


def test_one_seed_is_one_start(tmp_path: Path) -> None:
    options = given(tmp_path)
    args = ModelArguments(options["model"], options["task"], rank=2)
    data = DataArguments([options["train_file"]], max_length=16)
    setup = prepare(args, data)
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
        trained = weight.requires_grad or "lora_A" in name
        if trained:
            assert not torch.equal(weight, weights["other"][name])
    assert any("lora_A" in name for name in weights["lora"])


def test_a_second_model_saves_the_same_modules(tmp_path: Path) -> None:
    options = given(tmp_path)
    args = ModelArguments(options["model"], options["task"], modules_to_save=["pooler"])
    setup = prepare(args, DataArguments([options["train_file"]], max_length=16))
    saved = [setup.model(0, dora=True).peft_config["default"].modules_to_save for _ in range(2)]
    assert saved[0] == saved[1] and "pooler" in saved[0] and args.modules_to_save == ["pooler"]


def test_bootstrap_is_the_binomial_error() -> None:
    labels = np.zeros(400, dtype=int)
    predictions = (np.arange(400) % 5 == 0).astype(int)  # a fifth is wrong
    draws = bootstrap(
        lambda rows: float((rows.predictions == rows.label_ids).mean()), predictions, labels
    )
    assert draws.std() == pytest.approx((0.8 * 0.2 / 400) ** 0.5, rel=0.15)


def test_equal_values_of_two_seeds_have_the_error_of_the_test_rows() -> None:
    draws = np.array([0.7, 0.9])
    assert mean_and_error([0.8, 0.8], [draws, draws]) == pytest.approx((0.8, 0.1))
    # Rows' and seeds' errors add in squares: √(s²/2 + 0.1²) with s² = 0.02.
    assert mean_and_error([0.7, 0.9], [draws, draws])[1] == pytest.approx((0.01 + 0.01) ** 0.5)


def test_rows_of_runs_by_hand() -> None:
    draws = np.array([0.0, 2.0])
    runs = [
        Run("a", 0, {"m": 1.0, "loss": 0.5}, draws, 2.0, 5, 7),
        Run("b", 0, {"m": 4.0, "loss": 0.25}, draws + 3, 1.0, 6, 7),
        Run("a", 1, {"m": 3.0, "loss": 0.7}, draws, 4.0, 5, 7),
    ]
    a, b = summarise(runs, "m")
    assert (a.metrics["m"], a.metrics["loss"], a.seconds) == (2.0, pytest.approx(0.6), 3.0)
    assert a.spread == pytest.approx(2**0.5) and a.difference is None
    assert a.standard_error == pytest.approx((1 + 1) ** 0.5)
    # On the same rows and the same seed b is 3 better in every draw: no error of the rows is left.
    assert (b.spread, b.difference, b.difference_error) == (None, 3.0, 0.0)
    table = markdown([a, b], "m", ["loss"], 2, 40).splitlines()
    assert table[3] == "| b | 4.0000 ± 1.0000 | +3.0000 ± 0.0000 | 0.2500 | 1.0 | 6 | 7 |"


def test_a_method_may_name_its_estimator(tmp_path: Path) -> None:
    args = MethodArguments(str(tmp_path), hypergradient="darts", xi=0.1, use_cpu=True)
    assert arguments_of("bidora", args).estimator().xi == 0.1
    own = arguments_of("bidora:cg:steps=3", args)
    assert (own.method, own.estimator().steps) == ("bidora", 3)
    assert (args.method, args.xi, args.save_strategy) == ("bidora", 0.1, "steps")
    assert own.save_strategy == "no"
    best = MethodArguments(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", use_cpu=True
    )
    assert arguments_of("dora", best).save_strategy == "steps"


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("bidorra", "'bidora'"),
        ("damping=1.0", "quotes"),
        ("lora:cg", "'lora:cg'"),
        ("bidora:dart", "'darts'"),
    ],
)
def test_unknown_methods_are_refused_before_any_work(
    method: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in failure(capsys, "compare", *flags(**NOWHERE, methods=["lora", method]))


def test_methods_twice_and_no_evaluation_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProblemError, match="seeds: 3"):
        CompareArguments(seeds=[3, 1, 3])
    options = given(tmp_path, eval_fraction=0)
    del options["eval_file"]
    assert "eval_file" in failure(capsys, "compare", *flags(**options))
