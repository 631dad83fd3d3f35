"""``--task sft``: texts, prompts with completions and messages, through TRL's trainer."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from tests.support import language
from tests.support.cli import Capture, read_csv, refused, results_of, run
from tests.support.comparisons import passes_of
from tests.support.files import write

pytest.importorskip("trl")

SETTINGS: dict[str, Any] = {
    "task": "sft",
    "rank": 2,
    "max_length": 24,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama, whose sizes bitsandbytes can pack on a CPU, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
    language.language_model(max_position_embeddings=64, **sizes).save_pretrained(folder)
    language.tokenizer().save_pretrained(folder)
    return folder


def options(folder: Path, model: Path, layout: str = "completion", **changes: Any) -> Any:
    """16 training rows and 6 evaluation rows in files of a layout; None leaves an option out."""
    files = {
        f"{name}_file": write(
            folder / f"{name}.jsonl", language.rows(layout, count, seed).to_list()
        )
        for seed, (name, count) in enumerate({"train": 16, "eval": 6}.items())
    }
    every = {**SETTINGS, "model": model, "output_dir": folder / "out", **files, **changes}
    return {name: value for name, value in every.items() if value is not None}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["text", "completion", "messages"])
def test_rows_have_scores(tmp_path: Path, model: Path, layout: str) -> None:
    """In the order of the file, without the row whose completion is cut off."""
    rows = language.rows(layout, 8).to_list()
    if layout == "completion":
        rows[2]["prompt"] = "say a " * 12
    chosen = options(tmp_path, model, layout, assistant_only_loss=layout == "messages")
    write(tmp_path / "train.jsonl", rows)
    run("attribute", **chosen, estimator="gradient")
    table = read_csv(tmp_path / "out/attribution.csv")
    numbers = [k for k in range(8) if layout != "completion" or k != 2]
    assert [int(line["row"]) for line in table] == numbers
    for line, number in zip(table, numbers, strict=True):
        assert all(line[column] == str(value) for column, value in rows[number].items())
    assert PeftConfig.from_pretrained(tmp_path / "out").task_type == "CAUSAL_LM"


@pytest.mark.parametrize("method", ["bidora", "lora"])
def test_a_method_trains(tmp_path: Path, model: Path, method: str) -> None:
    chosen = options(tmp_path, model, method=method, max_steps=2, lower_steps=1)
    run("train", **chosen)
    results = results_of(tmp_path)
    assert results["eval_loss"] > 0 and ("retrain_loss" in results) == (method == "bidora")
    assert PeftConfig.from_pretrained(tmp_path / "out").use_dora == (method == "bidora")


@pytest.mark.slow
def test_methods_are_compared(tmp_path: Path, model: Path) -> None:
    few: dict[str, Any] = {"passes": 8, "seeds": [0, 1], "rates": [5e-2], "upper_rates": [1e-2]}
    chosen = options(tmp_path, model, methods=["lora", "bidora"], max_steps=None, **few)
    run("compare", **chosen, lower_steps=1)
    lines = map(json.loads, (tmp_path / "out/runs.jsonl").read_text().splitlines())
    results = [line for line in lines if "spent" in line]
    assert len(results) == 4 * 2
    assert all(x["metrics"]["eval_loss"] > 0 and 6 <= passes_of(x) <= 9 for x in results)


USER = {"role": "user", "content": "say a"}
TWICE = [{"prompt": "a", "completion": None}, {"prompt": "a"}]
# Rows for training, or else for evaluation, and the words of the error.
ROWS: list[tuple[str, list[Any], str]] = [
    ("eval", [{"text": "a"}], "the evaluation examples: .*not 'prompt' and 'completion', as"),
    ("train", [{"question": "a"}], "examples: .*'question'.*not 'messages' or 'prompt' and"),
    ("train", [{"text": " "}], "training examples: row 0 .*'text' has ' '"),
    ("train", [{"prompt": "a", "completion": ""}], "row 0 .*'completion' has ''"),
    ("train", TWICE, "'completion' is empty in"),
    ("train", [{"prompt": "a", "completion": [USER]}], "give two texts, or two lists"),
    ("train", [{"messages": [USER, {"content": "a"}]}], "not a list of messages with a 'role'"),
    ("train", [{"messages": [{"role": "assistant", "content": " "}]}], "an empty message of the"),
    ("train", [{"messages": "say a"}], "'say a', not a list of messages"),
]
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_length": 100}, "max_length: the model reads 2 to 64 tokens, got 100"),
    ({"packing_strategy": "bdf", "packing": True}, "packing_strategy|strategy"),
    ({"text_columns": ["text"]}, "--text_columns: is for other tasks"),
    ({"tokenizer": "plain"}, "messages, and the tokenizer no chat template"),
]


@pytest.mark.parametrize(
    ("name", "rows", "changes", "words"),
    [*((name, rows, {}, words) for name, rows, words in ROWS), *(("", [], *x) for x in OPTIONS)],
)
def test_bad_rows_and_options_are_one_line_before_any_work(
    tmp_path: Path,
    model: Path,
    capsys: Capture,
    name: str,
    rows: list[Any],
    changes: dict[str, Any],
    words: str,
) -> None:
    if "tokenizer" in changes:
        plain = language.tokenizer()
        plain.chat_template = None
        plain.save_pretrained(tmp_path / "plain")
        changes = {"tokenizer": tmp_path / "plain", "layout": "messages"}
    chosen = options(tmp_path, model, **changes)
    if name:
        write(tmp_path / f"{name}.jsonl", rows)
    refused(capsys, "attribute", chosen, words)
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_without_trl_there_is_one_line(
    tmp_path: Path, model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    refused(capsys, "attribute", options(tmp_path, model), r"pip install 'hyperopt-peft\[trl\]'")
