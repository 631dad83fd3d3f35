"""``merge``: one model in place of two, and it is the same function."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
)

from hyperopt_peft import ProblemError
from hyperopt_peft.cli.merge import merge
from tests.support.cli import Capture, refused, run, small_run, stock
from tests.support.files import KINDS, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("merge")
    run("train", **small_run(folder, retrain="none"))
    return folder


def test_merged_model_loads_alone_and_is_the_same_function(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    run("merge", adapter=folder / "out", output_dir=tmp_path / "merged")
    assert "largest difference" in capsys.readouterr().out
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"}
    adapted, _ = stock(folder)
    batch = AutoTokenizer.from_pretrained(tmp_path / "merged")("w1 w5", return_tensors="pt")
    with torch.no_grad():
        difference = (merged(**batch).logits - adapted(**batch).logits).abs().max()
        with adapted.disable_adapter():
            untrained = adapted(**batch).logits
    assert difference < 1e-5
    assert (merged(**batch).logits - untrained).abs().max() > 1e-2
    assert not [name for name in merged.state_dict() if "lora" in name]


@pytest.mark.parametrize("task", [task for task in KINDS if task != "text-classification"])
def test_every_task_merges_in_float32_and_is_cast_afterwards(task: str, tmp_path: Path) -> None:
    run("train", **small_run(tmp_path, task, max_steps=2, retrain="none", learning_rate=1e-3))
    weights = {}
    for dtype in ("float32", "bfloat16"):
        run("merge", adapter=tmp_path / "out", output_dir=tmp_path / dtype, dtype=dtype)
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
        weights[dtype] = load_file(tmp_path / dtype / "model.safetensors")
    for name, weight in weights["bfloat16"].items():
        assert torch.equal(weight, weights["float32"][name].to(weight.dtype))


def test_a_head_of_two_layers_is_trained_in_full(tmp_path: Path) -> None:
    """PEFT finds the head by the end of its name: DistilBERT's ``pre_classifier`` is of it."""
    options = small_run(tmp_path, method="lora", max_steps=1, target_modules="all-linear")
    sizes = {"dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 50}
    DistilBertModel(DistilBertConfig(**sizes)).save_pretrained(options["model"])
    run("train", **options)
    run("merge", adapter=tmp_path / "out", output_dir=tmp_path / "merged")


def test_bad_adapters_are_named_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    output, other = tmp_path / "merged", save_model(tmp_path / "other", "causal-lm")
    broken, cut = tmp_path / "broken", tmp_path / "cut"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    shutil.copytree(folder / "out", cut)
    weights = load_file(cut / "adapter_model.safetensors")
    narrow = {n: w[..., :3].contiguous() if "lora_A" in n else w for n, w in weights.items()}
    save_file(narrow, cut / "adapter_model.safetensors")
    for changes, words in (
        ({"output_dir": tmp_path}, "output_dir: .* is not an empty folder"),
        ({"adapter": tmp_path / "none"}, "adapter: .*none/adapter_config.json"),
        ({"adapter": broken}, "adapter: .*broken/adapter_config.json"),
        ({"adapter": cut}, "adapter: .*cut does not fit .*lora_A"),
        ({"dtype": "float8"}, "--dtype"),
        ({"model": other}, f"model: {other} is not .* bert"),
    ):
        options: dict[str, Any] = {"adapter": folder / "out", "output_dir": output, **changes}
        refused(capsys, "merge", options, words)
    assert not output.exists()


def test_a_merge_that_changes_the_function_is_refused(folder: Path) -> None:
    model, _ = stock(folder)
    model.merge_and_unload = model.unload  # which leaves the adapter out
    with pytest.raises(ProblemError, match=r"logits of the merged model differ"):
        merge(model)
