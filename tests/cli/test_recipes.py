"""The recipes in examples/recipes/glue: their numbers are the published ones, and they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, ReadInstruction, Value
from safetensors.torch import load_file

from hyperopt_peft.cli.text.setup import choose
from hyperopt_peft.cli.train import TrainArguments
from hyperopt_peft.hypergradients import DARTS
from hyperopt_peft.problems import BiDoRA
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
#: The columns with texts of GLUE on the hub.
TEXTS = {
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
    "stsb": ["sentence1", "sentence2"],
}
HELD_OUT = {"mnli": ["validation_matched", "validation_mismatched"]}


@pytest.mark.parametrize("recipe", sorted({*PUBLISHED, *(x.stem for x in FOLDER.glob("*.yaml"))}))
def test_numbers_are_the_published_ones_and_data_those_of_the_hub(recipe: str) -> None:
    chosen = choose("train", TrainArguments, [f"{FOLDER}/{recipe}.yaml"])
    model, data, args = chosen.model, chosen.data, chosen.args
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
    assert (chosen.method, args.lower_steps) == (BiDoRA(gamma=1e-5), 1)
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
    task = recipe.rpartition("-")[2]
    assert model.model == f"FacebookAI/{recipe.removesuffix(f'-{task}')}"
    assert (data.dataset, data.dataset_config) == ("nyu-mll/glue", task)
    assert data.text_columns == TEXTS[task] and data.label_column == "label"
    assert data.eval_split == "+".join(HELD_OUT.get(task, ["validation"]))
    assert args.output_dir == f"outputs/glue/{recipe}"
    if task != "qqp":
        assert data.train_split == "train"
        return
    slices = ReadInstruction.from_spec(data.train_split).to_absolute({"train": 363_846})
    rows = [(each.from_ or 0, each.to or 363_846) for each in slices]
    assert rows == [(0, 310_121), (310_122, 362_225), (362_226, 363_846)]


def test_a_few_steps_of_two_held_out_splits_are_trained(tmp_path: Path) -> None:
    """On a small model and a folder that `datasets` reads as it reads GLUE on the hub."""
    recipe, (first, second) = "roberta-base-mnli", TEXTS["mnli"]
    label = ClassLabel(names=["entailment", "neutral", "contradiction"])
    features = Features({first: Value("string"), second: Value("string"), "label": label})
    files = []
    for number, split in enumerate(["train", *HELD_OUT["mnli"]]):
        rows = [
            {first: f"{WORDS[7 * number + i]} w1", second: "w2", "label": i % 3}
            for i in range(20 if split == "train" else 6)
        ]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"glue/{split}.parquet")
        files.append({"split": split, "path": f"{split}.parquet"})
    configs = yaml.safe_dump({"configs": [{"config_name": "mnli", "data_files": files}]})
    (tmp_path / "glue/README.md").write_text(f"---\n{configs}---\n")
    options = {"model": save_model(tmp_path / "model"), "dataset": tmp_path / "glue"}
    options |= {"use_cpu": True, "disable_tqdm": True, "output_dir": tmp_path / "out"}
    shorter = {"max_steps": 3, "retrain_arguments": {"max_steps": 2}}
    run("train", f"{FOLDER}/{recipe}.yaml", **options, **shorter)
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert "retrain_loss" in results and "eval_accuracy" in results
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        assert sum(name in key for key in saved) == 4  # query and value of two layers
