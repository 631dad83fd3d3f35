"""``compare``: same data, budget and start; the table is what the runs found."""

import json
import statistics

import pytest
import torch

from hyperopt_peft import ProblemError
from hyperopt_peft.cli.compare_methods import (
    CompareArguments,
    Run,
    arguments_of,
    markdown,
    summarise,
)
from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.text.data import DataArguments
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import prepare
from hyperopt_peft.problems import BiDoRATrainingArguments
from tests.cli.test_main import failure
from tests.cli.test_train import given
from tests.support.files import flags

METHODS = ["lora", "dora", "bidora", "bidora:cg:steps=2,damping=1.0"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    options = given(folder, methods=METHODS, seeds=[0, 1], retrain_steps=3)
    assert main(["compare", *flags(**options)]) == 0
    return folder / "out", json.loads((folder / "out/comparison.json").read_text())


def test_every_method_has_the_same_budget(compared):
    _, record = compared
    assert [(run["method"], run["seed"]) for run in record["runs"]] == [
        (method, seed) for seed in (0, 1) for method in METHODS
    ]
    assert {run["steps"] for run in record["runs"]} == {4 + 3}


def test_the_table_is_what_the_runs_found(compared):
    folder, record = compared
    table = (folder / "comparison.md").read_text()
    for row in record["methods"]:
        values = [
            run["metrics"]["eval_accuracy"]
            for run in record["runs"]
            if run["method"] == row["method"]
        ]
        assert row["mean"] == pytest.approx(statistics.fmean(values))
        assert row["spread"] == pytest.approx(statistics.stdev(values))
        assert f"| {row['method']} | {row['mean']:.4f} | {row['spread']:.4f} |" in table
    trainable = {row["method"]: row["trainable_parameters"] for row in record["methods"]}
    assert trainable["dora"] == trainable["bidora"] > trainable["lora"]


def test_a_picture_and_no_checkpoints(compared):
    folder, _ = compared
    assert (folder / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.rglob("checkpoint-*"))


def test_one_seed_is_one_start(tmp_path):
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


def test_a_second_model_saves_the_same_modules(tmp_path):
    options = given(tmp_path)
    args = ModelArguments(options["model"], options["task"], modules_to_save=["pooler"])
    setup = prepare(args, DataArguments([options["train_file"]], max_length=16))
    saved = [setup.model(0, dora=True).peft_config["default"].modules_to_save for _ in range(2)]
    assert saved[0] == saved[1] and "pooler" in saved[0] and args.modules_to_save == ["pooler"]


def test_rows_of_runs_by_hand():
    runs = [
        Run("a", 0, {"m": 1.0}, 2.0, 5, 7),
        Run("b", 0, {"m": 4.0}, 1.0, 6, 7),
        Run("a", 1, {"m": 3.0}, 4.0, 5, 7),
    ]
    a, b = summarise(runs, "m")
    assert (a.mean, a.spread, a.seconds) == (2.0, pytest.approx(2**0.5), 3.0)
    assert (b.mean, b.spread) == (4.0, None)
    assert markdown([b], "m", 1).splitlines()[2] == "| b | 4.0000 | – | 1.0 | 6 | 7 |"


def test_a_method_may_name_its_estimator(tmp_path):
    args = BiDoRATrainingArguments(str(tmp_path), xi=0.1, use_cpu=True)
    assert arguments_of("bidora", args).estimator().xi == 0.1
    own = arguments_of("bidora:cg:steps=3", args)
    assert (own.method, own.estimator().steps) == ("bidora", 3)
    assert (args.method, args.xi, args.save_strategy) == ("bidora", 0.1, "steps")
    assert own.save_strategy == "no"
    best = BiDoRATrainingArguments(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", use_cpu=True
    )
    assert arguments_of("dora", best).save_strategy == "steps"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("bidorra", "unknown method 'bidorra'; did you mean 'bidora'"),
        ("damping=1.0", "known are lora, dora, bidora; in YAML quotes keep the commas"),
        ("lora:cg", "lora takes no estimator, got 'lora:cg'"),
        ("bidora:dart", "unknown estimator 'dart'; did you mean 'darts'"),
    ],
)
def test_unknown_methods_are_refused_before_any_work(tmp_path, method, message, capsys):
    options = {"model": "none", "task": "causal-lm", "train_file": "none.csv"}
    assert message in failure(capsys, "compare", *flags(**options, methods=["lora", method]))


def test_methods_twice_and_no_evaluation_are_refused(tmp_path, capsys):
    with pytest.raises(ProblemError, match="seeds: 3 is given twice"):
        CompareArguments(seeds=[3, 1, 3])
    options = given(tmp_path, eval_fraction=0)
    del options["eval_file"]
    assert "compare needs evaluation examples" in failure(capsys, "compare", *flags(**options))
