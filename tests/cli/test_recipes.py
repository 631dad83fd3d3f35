"""The recipes in examples/recipes/glue: their numbers are the published ones, and they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, ReadInstruction, Value
from safetensors.torch import load_file

from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.text.setup import TYPES
from hyperopt_peft.cli.train import TrainArguments
from hyperopt_peft.hypergradients import DARTS
from tests.support.cli import run
from tests.support.files import WORDS, save_model

FOLDER = Path(__file__).parents[2] / "examples/recipes/glue"

#: What the published code's scripts set. Rate of both levels, weight decay of the lower and of the
#: upper level, steps; of the retraining its rate, weight decay and steps.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "roberta-base-cola": (5e-5, 0.1, 0.1, 20_000, (3e-5, 0.1, 30_000)),
    "roberta-base-mnli": (5e-5, 0.1, 0.1, 30_000, (7e-5, 0.1, 40_000)),
    "roberta-base-mrpc": (2e-5, 0.1, 0.1, 28_000, None),
    "roberta-base-qnli": (2e-5, 0.1, 0.0, 20_000, None),
    "roberta-base-qqp": (5e-5, 0.1, 0.1, 30_000, (5e-5, 0.1, 30_000)),
    "roberta-base-rte": (1e-5, 0.1, 0.1, 15_000, (3e-5, 0.1, 15_000)),
    "roberta-base-sst2": (1e-5, 0.12, 0.0, 12_000, None),
    "roberta-base-stsb": (1e-5, 0.1, 0.01, 12_000, None),
    "roberta-large-cola": (1e-5, 1.0, 1.0, 20_000, (1e-5, 1.0, 40_000)),
    "roberta-large-mnli": (1e-5, 0.5, 0.5, 55_000, None),
    "roberta-large-mrpc": (1e-5, 0.0, 0.0, 40_000, None),
    "roberta-large-qnli": (1e-5, 0.5, 0.5, 60_000, None),
    "roberta-large-qqp": (1e-5, 0.5, 0.5, 50_000, None),
    "roberta-large-rte": (1e-5, 0.5, 0.5, 15_000, (1e-5, 0.3, 30_000)),
    "roberta-large-sst2": (1e-5, 0.5, 0.5, 20_000, None),
    "roberta-large-stsb": (1e-5, 0.5, 0.5, 14_000, None),
}
RECIPES = pytest.mark.parametrize("recipe", PUBLISHED)
#: A classification, a pair of held-out parts, a regression and a retraining; the others are slow.
FEW = ("roberta-base-mnli", "roberta-base-stsb", "roberta-large-rte")
RUNS = [each if each in FEW else pytest.param(each, marks=pytest.mark.slow) for each in PUBLISHED]

#: GLUE on the hub: the columns with texts, and the classes.
GLUE: dict[str, tuple[list[str], list[str] | None]] = {
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "stsb": (["sentence1", "sentence2"], None),
}


def path(recipe: str) -> str:
    return str(FOLDER / f"{recipe}.yaml")


def task_of(recipe: str) -> str:
    return recipe.rpartition("-")[2]


def splits(task: str) -> list[str]:
    held_out = ["_matched", "_mismatched"] if task == "mnli" else [""]
    return ["train", *[f"validation{suffix}" for suffix in held_out]]


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that `datasets` reads as it reads GLUE on the hub, with a few rows."""
    folder = tmp_path_factory.mktemp("glue")
    configs = []
    for task, (columns, classes) in GLUE.items():
        label = Value("float32") if classes is None else ClassLabel(names=classes)
        features = {**{name: Value("string") for name in columns}, "label": label}
        files = []
        for number, split in enumerate(splits(task)):
            rows = [
                {
                    **{n: f"{WORDS[(7 * number + i + j) % 40]} w1" for j, n in enumerate(columns)},
                    "label": i % 5 / 2 if classes is None else i % len(classes),
                }
                for i in range(20 if split == "train" else 6)
            ]
            file = folder / task / f"{split}.parquet"
            file.parent.mkdir(exist_ok=True)
            Dataset.from_list(rows, features=Features(features)).to_parquet(file)
            files.append({"split": split, "path": f"{task}/{file.name}"})
        configs.append({"config_name": task, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return str(folder)


def small(folder: Path, recipe: str, glue: str) -> dict[str, Any]:
    """Options that put a small model and small data in the place of the recipe's."""
    changes = {"model": save_model(folder / "model"), "dataset": glue, "use_cpu": True}
    if task_of(recipe) == "qqp":
        changes["train_split"] = "train"
    return {**changes, "disable_tqdm": True, "output_dir": folder / "out"}


def test_every_recipe_is_known() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == sorted(PUBLISHED)


@RECIPES
def test_numbers_are_the_published_ones_and_data_those_of_the_hub(recipe: str) -> None:
    _, model, data, args = parse("train", (TrainArguments, *TYPES), [path(recipe)])
    rate, decay, upper_decay, steps, again = PUBLISHED[recipe]
    assert (args.learning_rate, args.upper_learning_rate) == (rate, rate)
    assert (args.weight_decay, args.upper_weight_decay) == (decay, upper_decay)
    assert args.max_steps == steps
    assert args.retrain == ("none" if again is None else "scratch")
    if again is not None:
        second = args.for_retraining()
        assert (second.learning_rate, second.weight_decay, second.max_steps) == again
    # Common to all.
    estimator = args.estimator()
    assert isinstance(estimator, DARTS) and estimator.xi == 1
    assert (args.method, args.gamma, args.lower_steps) == ("bidora", 1e-5, 1)
    assert (args.upper_fraction, args.upper_prior) == (0.2, None)
    assert args.per_device_train_batch_size == (64 if recipe == "roberta-large-qnli" else 32)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert args.optim.startswith("adamw_torch")
    assert (args.lr_scheduler_type, args.get_warmup_steps(steps)) == ("linear", steps // 10)
    assert (args.max_grad_norm, args.upper_max_grad_norm) == (0, 0)
    assert not args.bf16 and not args.fp16 and args.gradient_accumulation_steps == 1
    assert (model.rank, model.target_modules) == (4, ["query", "value"])
    assert model.alpha == model.rank and model.dropout == 0 and model.dtype == "float32"
    assert data.max_length == (512 if "base" in recipe else 128)
    task = task_of(recipe)
    assert model.model == f"FacebookAI/{recipe.removesuffix(f'-{task}')}"
    assert (data.dataset, data.dataset_config) == ("nyu-mll/glue", task)
    assert data.text_columns == GLUE[task][0] and data.label_column == "label"
    assert data.eval_split == "+".join(splits(task)[1:])
    assert args.output_dir == f"outputs/glue/{recipe}"
    if task != "qqp":
        assert data.train_split == "train"
        return
    slices = ReadInstruction.from_spec(data.train_split).to_absolute({"train": 363_846})
    rows = [(each.from_ or 0, each.to or 363_846) for each in slices]
    assert rows == [(0, 310_121), (310_122, 362_225), (362_226, 363_846)]


@pytest.mark.parametrize("recipe", RUNS)
def test_dry_run(
    recipe: str, glue: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", path(recipe), "--dry-run", **small(tmp_path, recipe, glue))
    printed = capsys.readouterr().out
    steps, again = PUBLISHED[recipe][3], PUBLISHED[recipe][4]
    retraining = again[2] if again else 0
    assert f"steps: {steps} lower in the search, {steps} upper, {retraining} in the" in printed
    evaluated = 12 if task_of(recipe) == "mnli" else 6
    used = f"16 lower level, 4 upper level, {20 if again else 0} retraining, {evaluated} evaluation"
    assert f"examples: {used}" in printed
    assert "estimator: DARTS(" in printed
    if classes := GLUE[task_of(recipe)][1]:
        assert f"labels: {', '.join(classes)}\n" in printed


@pytest.mark.parametrize("recipe", RUNS)
def test_a_few_steps_are_trained(recipe: str, glue: str, tmp_path: Path) -> None:
    again = PUBLISHED[recipe][4]
    steps = {"max_steps": 3, **({"retrain_steps": 2} if again else {})}
    run("train", path(recipe), **small(tmp_path, recipe, glue), **steps)
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert ("retrain_loss" in results) == bool(again)
    assert ("eval_pearson" if task_of(recipe) == "stsb" else "eval_accuracy") in results
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        assert sum(name in key for key in saved) == 4  # query and value of two layers
    assert all(value.any() for name, value in saved.items() if "lora_B" in name)  # 0 at the start
