"""The recipes in examples/recipes/glue run."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file

from tests.support.cli import run
from tests.support.files import WORDS, save_model

FOLDER = Path(__file__).parents[2] / "examples/recipes/glue"

#: By recipe, the columns with texts and the held-out splits of GLUE on the hub.
RECIPES = {
    "roberta-base-rte": (["sentence1", "sentence2"], ["validation"]),
    "roberta-large-mnli": (
        ["premise", "hypothesis"],
        ["validation_matched", "validation_mismatched"],
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_few_steps_are_trained(recipe: str, tmp_path: Path) -> None:
    """On a small model and a folder that `datasets` reads as it reads GLUE on the hub."""
    (first, second), held_out = RECIPES[recipe]
    task = recipe.rpartition("-")[2]
    label = ClassLabel(names=["entailment", "neutral", "contradiction"])
    features = Features({first: Value("string"), second: Value("string"), "label": label})
    files = []
    for number, split in enumerate(["train", *held_out]):
        rows = [
            {first: f"{WORDS[7 * number + i]} w1", second: "w2", "label": i % 3}
            for i in range(20 if split == "train" else 6)
        ]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"glue/{split}.parquet")
        files.append({"split": split, "path": f"{split}.parquet"})
    configs = yaml.safe_dump({"configs": [{"config_name": task, "data_files": files}]})
    (tmp_path / "glue/README.md").write_text(f"---\n{configs}---\n")
    options = {"model": save_model(tmp_path / "model"), "dataset": tmp_path / "glue"}
    options |= {"use_cpu": True, "disable_tqdm": True, "output_dir": tmp_path / "out"}
    again = "base" in recipe  # the other recipe does not train again
    shorter = {"max_steps": 3} | ({"retrain_arguments": {"max_steps": 2}} if again else {})
    run("train", f"{FOLDER}/{recipe}.yaml", **options, **shorter)
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert ("retrain_loss" in results) == again and "eval_accuracy" in results
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        assert sum(name in key for key in saved) == 4  # query and value of two layers
