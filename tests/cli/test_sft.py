"""``--task sft``: texts, prompts with completions and messages, through TRL's trainer."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftConfig
from safetensors.torch import load_file

from tests.support import language
from tests.support.cli import refused, run
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
    "lower_steps": 2,
    "retrain_steps": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "baseline_folds": 0,
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
    """Two sources of 16 rows and 6 trusted rows in files of a layout."""
    files = {
        name: write(folder / f"{name}.jsonl", language.rows(layout, count, seed).to_list())
        for seed, (name, count) in enumerate({"web": 16, "forum": 16, "trusted": 6}.items())
    }
    given = {
        "model": model,
        "output_dir": folder / "out",
        "trusted_file": files.pop("trusted"),
        "sources": yaml.safe_dump(files, sort_keys=False),
    }
    every = {**SETTINGS, **given, **changes}
    return {name: value for name, value in every.items() if value is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("text", {"packing": True, "baseline_folds": 2, "equal_passes": False}),
        ("completion", {"load_in_4bit": True}),
        ("messages", {"assistant_only_loss": True, "bf16": False, "source_column": "origin"}),
    ],
)
def test_weights_mixture_and_adapter(
    tmp_path: Path,
    model: Path,
    layout: str,
    changes: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "load_in_4bit" in changes:
        pytest.importorskip("bitsandbytes")
    if "source_column" in changes:
        rows = language.rows(layout, 32).to_list()
        named = [{**row, "origin": ["web", "forum"][k % 2]} for k, row in enumerate(rows)]
        changes |= {"sources": None, "train_file": write(tmp_path / "all.jsonl", named)}
    test = write(tmp_path / "test.jsonl", language.rows(layout, 5, seed=9).to_list())
    run("mix", **options(tmp_path, model, layout, test_file=test, **changes))
    sources = json.loads((tmp_path / "out/weights.json").read_text())["sources"]
    assert list(sources) == ["web", "forum", "trusted"]
    assert sum(source["share"] for source in sources.values()) == pytest.approx(1)
    assert PeftConfig.from_pretrained(tmp_path / "out").task_type == "CAUSAL_LM"
    adapter = load_file(tmp_path / "out/adapter_model.safetensors")
    assert any("lora_B" in name and tensor.any() for name, tensor in adapter.items())
    if "source_column" not in changes:
        mixture = yaml.safe_load((tmp_path / "out/mixture/trl.yaml").read_text())
        web, forum = (entry["fraction"] for entry in mixture["datasets"])
        weights = [sources[name]["row_weight"] for name in ("web", "forum")]
        assert web / forum == pytest.approx(weights[0] / weights[1])
    run("merge", adapter=tmp_path / "out", output_dir=tmp_path / "merged")
    printed = capsys.readouterr().out
    assert "eval_loss" in printed and "row weight" in printed
    assert ("by 2 folds" in printed) == ("baseline_folds" in changes)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["text", "completion", "messages"])
def test_rows_have_scores(tmp_path: Path, model: Path, layout: str) -> None:
    """In the order of the file, without the row whose completion is cut off."""
    rows = language.rows(layout, 8).to_list()
    if layout == "completion":
        rows[2]["prompt"] = "say a " * 12
    evaluation = [
        {**row, "origin": "xy"[k % 2]} for k, row in enumerate(language.rows(layout, 4, 9))
    ]
    chosen = options(tmp_path, model, train_file=write(tmp_path / "train.jsonl", rows))
    for name in ("sources", "trusted_file", "baseline_folds", "lower_steps", "retrain_steps"):
        del chosen[name]
    changes = {"eval_file": write(tmp_path / "eval.jsonl", evaluation), "slices": "origin"}
    run(
        "attribute",
        **chosen,
        **changes,
        assistant_only_loss=layout == "messages",
        estimator="gradient",
    )
    with (tmp_path / "out/attribution.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    numbers = [k for k in range(8) if layout != "completion" or k != 2]
    assert [int(line["row"]) for line in table] == numbers
    for line, number in zip(table, numbers, strict=True):
        assert all(line[column] == str(value) for column, value in rows[number].items())
        halves = float(line["score_x"]) + float(line["score_y"])
        assert float(line["score"]) == pytest.approx(halves / 2)
    assert PeftConfig.from_pretrained(tmp_path / "out").task_type == "CAUSAL_LM"


def test_no_retraining_without_rows(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"task": "sft", "model": model, "train_file": "a.csv", "use_cpu": True}
    refused(
        capsys,
        "attribute",
        chosen | {"retrain_without": 0.1},
        "retrain_without: is not of task sft",
    )


def messages(*said: dict[str, Any]) -> list[Any]:
    return [{"messages": list(said)}]


USER = {"role": "user", "content": "say a"}


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("forum", [{"text": "a b"}], r"forum.jsonl: .*not 'prompt' and 'completion', as the files"),
        ("web", [{"question": "a"}], "web.jsonl: .*'question'.*not 'messages' or 'prompt' and"),
        ("trusted", [{"text": "a"}], "the trusted examples: has the columns"),
        ("web", [{"text": " "}], "web.jsonl: row 0 .*'text' has ' '"),
        ("web", [{"prompt": "a", "completion": ""}], "row 0 .*'completion' has ''"),
        ("web", [{"prompt": "a", "completion": None}, {"prompt": "a"}], "'completion' is empty in"),
        ("web", [{"prompt": "a", "completion": [USER]}], "give two texts, or two lists"),
        ("web", messages(USER, {"content": "a"}), "without a role"),
        ("web", messages(USER, {"role": "assistant", "content": " "}), "an empty message of the"),
        ("web", [{"messages": "say a"}], "'say a', not a list of messages"),
        ("web", [{"messages": []}], "not a list of messages"),
        ("trusted", [], "trusted_file: .* (has no rows|cannot be read)"),
    ],
)
def test_bad_rows_are_one_line_before_any_work(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    rows: list[Any],
    words: str,
) -> None:
    chosen = options(tmp_path, model)
    write(tmp_path / f"{name}.jsonl", rows)
    refused(capsys, "mix", chosen, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_length": 100}, "max_length: the model reads 2 to 64 tokens, got 100"),
        ({"trusted_file": None}, "trusted_file: give"),
        ({"sources": None}, "sources: give either"),
        ({"packing_strategy": "bdf", "packing": True}, "packing_strategy|strategy"),
        ({"text_columns": ["text"]}, "--text_columns: an option of other tasks"),
        ({"trusted_file": "{folder}/web.jsonl"}, "16 of 16 rows are in a source too"),
        ({"eval_packing": False, "packing": True}, "eval_packing: "),
        (
            {"source_column": "origin", "sources": None, "train_file": "{folder}/web.jsonl"},
            "origin",
        ),
        ({"baseline_folds": 7}, "baseline_folds: .*the 6 rows of trusted_file, got 7"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: str,
) -> None:
    named = {
        name: value.format(folder=tmp_path) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    refused(capsys, "mix", options(tmp_path, model, **named), words)
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_messages_need_a_chat_template(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = language.tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    chosen = options(tmp_path, model, "messages", tokenizer=tmp_path / "plain")
    refused(capsys, "mix", chosen, "messages, and the tokenizer no chat template")


def test_without_trl_there_is_one_line(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    refused(capsys, "mix", options(tmp_path, model), r"pip install 'hyperopt-peft\[trl\]'")
