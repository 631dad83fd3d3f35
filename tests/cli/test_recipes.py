"""The recipes in examples/recipes/glue: they share the published settings, and they run."""

from __future__ import annotations

import json
from pathlib import Path

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


@pytest.mark.parametrize("recipe", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_what_all_recipes_share_and_data_of_the_hub(recipe: str) -> None:
    chosen = choose("train", TrainArguments, [f"{FOLDER}/{recipe}.yaml"])
    model, data, args = chosen.model, chosen.data, chosen.args
    assert args.learning_rate == args.upper_learning_rate and args.max_steps > 0
    assert args.retrain in ("none", "scratch") and args.for_retraining().max_steps > 0
    steps, estimator = args.max_steps, args.estimator()
    assert isinstance(estimator, DARTS) and estimator.xi == 1
    assert (chosen.method, args.lower_steps) == (BiDoRA(gamma=1e-5), 1)
    assert (args.with_defaults({}).upper_fraction, args.upper_prior) == (0.2, None)
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
