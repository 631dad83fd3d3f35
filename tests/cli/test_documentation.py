"""docs/command-line.md: its examples work, and its options are known."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hyperopt_peft.cli import COMMANDS
from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.text.tasks import TASKS
from tests.support.cli import Capture, run, small_run
from tests.support.documents import PAGES, blocks
from tests.support.files import rows, save_model, write

TEXT = PAGES["command-line.md"]
EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


def test_yaml_example_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(EXAMPLES[0])
    write(Path("train.csv"), rows(number=60))
    model = save_model(tmp_path / "model")
    run("train", "config.yaml", "--dry-run", "--use_cpu", model=model)
    printed = capsys.readouterr().out
    assert "method: BiDoRA(" in printed
    assert "estimator: minres:steps=5,damping=0.2" in printed
    # 48 examples after the evaluation's 12: 38 and 10; 5 epochs of 3 batches, and again.
    assert "examples: 38 lower level, 10 upper level, 48 retraining, 12 evaluation" in printed
    assert re.search(r"^search +1 +15\nretraining +1 +15$", printed, re.MULTILINE)


def test_yaml_example_of_language_models_is_read(tmp_path: Path, capsys: Capture) -> None:
    """Up to the files, which are not there."""
    pytest.importorskip("trl")
    (tmp_path / "sft.yaml").write_text(EXAMPLES[1])
    assert main(["attribute", str(tmp_path / "sft.yaml"), "--use_cpu"]) == 2
    assert "train_file: there is no file web.jsonl" in capsys.readouterr().err


def test_the_adapter_is_loaded_and_merged_as_the_pages_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers alone loads the merged model, which is the same function."""
    monkeypatch.chdir(tmp_path)
    options = small_run(tmp_path, output_dir="outputs/tweets", retrain="none", learning_rate=0.1)
    run("train", **options)
    (load,), (merge,) = (blocks(PAGES[name]) for name in ("command-line.md", "after-training.md"))
    names = {"tokenizer": AutoTokenizer.from_pretrained("outputs/tweets")}
    exec(load.replace("sentence-transformers/all-MiniLM-L6-v2", options["model"]), names)
    batch = names["tokenizer"]("w1 w5", return_tensors="pt")
    with torch.no_grad():
        adapted, names["base"] = names["model"](**batch).logits, names["model"].unload()
        untrained = names["base"](**batch).logits
    exec(merge.replace('"outputs"', '"outputs/tweets"'), names)
    merged = AutoModelForSequenceClassification.from_pretrained("merged").eval()
    batch = AutoTokenizer.from_pretrained("merged")("w1 w5", return_tensors="pt")
    torch.testing.assert_close(merged(**batch).logits.detach(), adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - untrained).abs().max() > 1e-2


def test_named_options_and_tasks_exist(capsys: Capture) -> None:
    options = {"--help", "--help_all", "--version"}
    for argv in [*([command] for command in COMMANDS), ["train", "--method", "sources"]]:
        main([*argv, "--help"])
        options |= set(re.findall(r"--\w[\w-]*", capsys.readouterr().out))
    assert set(re.findall(r"--\w[\w-]*", TEXT)) <= options
    assert set(re.findall(r"^\| `([\w-]+)`", TEXT, re.MULTILINE)) == set(TASKS)
    assert set(re.findall(r"^## (\S+)$", TEXT, re.MULTILINE)) == set(COMMANDS)
