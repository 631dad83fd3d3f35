"""The recipes in examples/recipes/glue: their numbers are the published ones, and they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, ReadInstruction, Value
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.text.setup import TYPES
from hyperopt_peft.cli.train import TrainArguments
from hyperopt_peft.hypergradients import DARTS
from tests.support.cli import stock
from tests.support.files import WORDS, flags

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


def save_roberta(folder: Path, recipe: str) -> str:
    """A small RoBERTa without a classifier, as the hub has them, and a tokenizer."""
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {word: number for number, word in enumerate([*special.values(), *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    ).save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=3 if "large" in recipe else 2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=514,
        type_vocab_size=1,
        initializer_range=0.5,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    return str(folder)


def small(folder: Path, recipe: str, glue: str) -> dict[str, Any]:
    """Options that put a small model and small data in the place of the recipe's."""
    own = {"model": save_roberta(folder / "model", recipe), "dataset": glue, "use_cpu": True}
    if task_of(recipe) == "qqp":
        own["train_split"] = "train"
    return {**own, "disable_tqdm": True, "output_dir": folder / "out"}


def test_every_recipe_is_known() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == sorted(PUBLISHED)


@RECIPES
def test_numbers_are_the_published_ones(recipe: str) -> None:
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


@RECIPES
def test_data_are_those_of_the_hub(recipe: str) -> None:
    _, model, data, args = parse("train", (TrainArguments, *TYPES), [path(recipe)])
    task = task_of(recipe)
    assert model.model == f"FacebookAI/{recipe.removesuffix(f'-{task}')}"
    assert (data.dataset, data.dataset_config) == ("nyu-mll/glue", task)
    assert data.text_columns == GLUE[task][0] and data.label_column == "label"
    assert data.eval_split == "+".join(splits(task)[1:])
    assert args.output_dir == f"outputs/glue/{recipe}"
    if task == "qqp":
        parts = ReadInstruction.from_spec(data.train_split).to_absolute({"train": 363_846})
        rows = [(part.from_ or 0, part.to or 363_846) for part in parts]
        assert rows == [(0, 310_121), (310_122, 362_225), (362_226, 363_846)]
    else:
        assert data.train_split == "train"


@RECIPES
def test_dry_run(
    recipe: str, glue: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = small(tmp_path, recipe, glue)
    assert main(["train", path(recipe), *flags(**options), "--dry-run"]) == 0
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


def test_dora_is_planned_from_a_recipe(
    glue: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = small(tmp_path, "roberta-base-cola", glue)
    argv = [path("roberta-base-cola"), *flags(**options, method="dora")]
    assert main(["train", *argv, "--dry-run"]) == 0
    assert "method: dora\n" in (printed := capsys.readouterr().out)
    assert "steps: 20000\n" in printed


@pytest.mark.parametrize(
    "recipe", ["roberta-base-cola", "roberta-base-mrpc", "roberta-base-stsb", "roberta-large-rte"]
)
def test_a_few_steps_end_in_an_adapter_for_stock_peft(
    recipe: str, glue: str, tmp_path: Path
) -> None:
    options = small(tmp_path, recipe, glue)
    if PUBLISHED[recipe][4]:
        options["retrain_steps"] = 2
    assert main(["train", path(recipe), *flags(**options, max_steps=3)]) == 0
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert ("retrain_loss" in results) == bool(PUBLISHED[recipe][4])
    metric = "eval_pearson" if task_of(recipe) == "stsb" else "eval_accuracy"
    assert metric in results

    regression = GLUE[task_of(recipe)][1] is None
    model, _ = stock(tmp_path, "regression" if regression else "text-classification")
    loaded = get_peft_model_state_dict(model)
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    layers = 3 if "large" in recipe else 2
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        assert sum(part in name for name in saved) == 2 * layers  # query and value
    assert all(value.any() for name, value in saved.items() if "lora_B" in name)  # 0 at the start
