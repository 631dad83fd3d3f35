"""``merge``: one model in place of two, and it is the same function."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hyperopt_peft import ProblemError
from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.merge import merge
from tests.support.cli import failure, given, stock
from tests.support.files import KINDS, flags, save_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    assert main(["train", *flags(**given(folder, retrain="none"))]) == 0
    return folder


def test_merged_model_loads_alone_and_is_the_same_function(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", *flags(adapter=run / "out", output_dir=tmp_path / "merged")]) == 0
    assert "largest difference" in capsys.readouterr().out
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"}
    adapted, _ = stock(run, "text-classification")
    batch = AutoTokenizer.from_pretrained(tmp_path / "merged")("w1 w5", return_tensors="pt")
    with torch.no_grad():
        difference = (merged(**batch).logits - adapted(**batch).logits).abs().max()
        base, _ = stock(run, "text-classification")
        with base.disable_adapter():
            untrained = base(**batch).logits
    assert difference < 1e-5
    assert (merged(**batch).logits - untrained).abs().max() > 1e-2
    assert not [name for name in merged.state_dict() if "lora" in name]


@pytest.mark.parametrize("task", [task for task in KINDS if task != "text-classification"])
def test_every_task_merges_in_float32_and_is_cast_afterwards(task: str, tmp_path: Path) -> None:
    options = given(tmp_path, task, max_steps=2, retrain="none", learning_rate=1e-3)
    assert main(["train", *flags(**options)]) == 0
    weights = {}
    for dtype in ("float32", "bfloat16"):
        options = {"adapter": tmp_path / "out", "output_dir": tmp_path / dtype, "dtype": dtype}
        assert main(["merge", *flags(**options)]) == 0
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
        weights[dtype] = load_file(tmp_path / dtype / "model.safetensors")
    for name, weight in weights["bfloat16"].items():
        assert torch.equal(weight, weights["float32"][name].to(weight.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_is_the_dtype_of_the_base_model(run: Path, tmp_path: Path, dtype: str) -> None:
    shutil.copytree(run / "out", tmp_path / "adapter")
    path = tmp_path / "adapter/base_config/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": dtype}))
    options = {"adapter": tmp_path / "adapter", "output_dir": tmp_path / "merged", "dtype": "auto"}
    assert main(["merge", *flags(**options)]) == 0
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == dtype


def test_a_folder_that_is_not_empty_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").write_text("text")
    argv = flags(adapter=run / "out", output_dir=tmp_path)
    assert "output_dir" in failure(capsys, "merge", *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_bad_adapters_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    argv = flags(adapter=tmp_path, output_dir=output)
    assert "adapter_config.json" in failure(capsys, "merge", *argv)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/adapter_config.json").write_text("{")
    argv = flags(adapter=tmp_path / "bad", output_dir=output)
    assert "bad/adapter_config.json" in failure(capsys, "merge", *argv)
    argv = flags(adapter=run / "out", output_dir=output, dtype="float8")
    assert "--dtype" in failure(capsys, "merge", *argv)
    other = save_model(tmp_path / "other", "causal-lm")
    argv = flags(adapter=run / "out", output_dir=output, model=other)
    error = failure(capsys, "merge", *argv)
    assert str(other) in error and "bert" in error
    assert not output.exists()


def test_an_adapter_of_another_size_does_not_fit(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(run / "out/adapter_model.safetensors")
    shutil.copytree(run / "out", tmp_path / "adapter")
    cut = {n: w[..., :3].contiguous() if "lora_A" in n else w for n, w in weights.items()}
    save_file(cut, tmp_path / "adapter/adapter_model.safetensors")
    argv = flags(adapter=tmp_path / "adapter", output_dir=tmp_path / "merged")
    error = failure(capsys, "merge", *argv)
    assert str(tmp_path / "adapter") in error and "lora_A" in error


def test_a_merge_that_changes_the_function_is_refused(run: Path) -> None:
    model, _ = stock(run, "text-classification")
    merge_and_unload = model.merge_and_unload

    def wrong() -> Any:
        merged = merge_and_unload()
        with torch.no_grad():
            merged.classifier.bias += 1
        return merged

    model.merge_and_unload = wrong
    with pytest.raises(ProblemError, match=r"logits.* 1,"):
        merge(model)
