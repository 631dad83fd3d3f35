"""``merge``: one model in place of two, and it is the same function."""

import json
import shutil

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
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    assert main(["train", *flags(**given(folder, retrain="none"))]) == 0
    return folder


def test_merged_model_loads_alone_and_is_the_same_function(run, tmp_path, capsys):
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
def test_every_task_merges(task, tmp_path):
    assert (
        main(
            [
                "train",
                *flags(**given(tmp_path, task, max_steps=2, retrain="none", learning_rate=1e-3)),
            ]
        )
        == 0
    )
    merge = flags(adapter=tmp_path / "out", output_dir=tmp_path / "merged", dtype="bfloat16")
    assert main(["merge", *merge]) == 0
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_a_folder_that_is_not_empty_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "kept").write_text("text")
    argv = flags(adapter=run / "out", output_dir=tmp_path)
    assert "is not an empty folder" in failure(capsys, "merge", *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_bad_adapters_are_named(run, tmp_path, capsys):
    output = tmp_path / "merged"
    argv = flags(adapter=tmp_path, output_dir=output)
    assert "has no adapter_config.json" in failure(capsys, "merge", *argv)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/adapter_config.json").write_text("{")
    argv = flags(adapter=tmp_path / "bad", output_dir=output)
    assert "cannot read" in failure(capsys, "merge", *argv)
    argv = flags(adapter=run / "out", output_dir=output, dtype="float8")
    assert "argument --dtype: invalid choice" in failure(capsys, "merge", *argv)
    other = save_model(tmp_path / "other", "causal-lm")
    argv = flags(adapter=run / "out", output_dir=output, model=other)
    assert "other is not the adapter's base model: it has no bert" in failure(
        capsys, "merge", *argv
    )
    assert not output.exists()


def test_an_adapter_of_another_size_does_not_fit(run, tmp_path, capsys):
    weights = load_file(run / "out/adapter_model.safetensors")
    shutil.copytree(run / "out", tmp_path / "adapter")
    cut = {n: w[..., :3].contiguous() if "lora_A" in n else w for n, w in weights.items()}
    save_file(cut, tmp_path / "adapter/adapter_model.safetensors")
    argv = flags(adapter=tmp_path / "adapter", output_dir=tmp_path / "merged")
    assert "does not fit" in failure(capsys, "merge", *argv)


def test_a_merge_that_changes_the_function_is_refused(run):
    model, _ = stock(run, "text-classification")
    merge_and_unload = model.merge_and_unload

    def wrong():
        merged = merge_and_unload()
        with torch.no_grad():
            merged.classifier.bias += 1
        return merged

    model.merge_and_unload = wrong
    with pytest.raises(ProblemError, match="logits differ by 1, "):
        merge(model)
