"""Files are read alike in every format; what cannot be trained on is named before any work."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hyperopt_peft import ProblemError
from hyperopt_peft.cli.text.data import DataArguments, hold_out, load
from hyperopt_peft.cli.text.encode import Encoder, class_names
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import prepare
from tests.support.cli import failure
from tests.support.files import WORDS, flags, rows, save_model, tokenizer, write

CLASSES: Literal["text-classification"] = "text-classification"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model")))


def prepared(model: str, path: str, **options: Any) -> Any:
    return prepare(ModelArguments(model, CLASSES), DataArguments([path], max_length=16, **options))


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
def test_every_format_holds_the_same_examples(tmp_path: Path, model: str, name: str) -> None:
    setup = prepared(model, write(tmp_path / name, rows()), eval_fraction=0)
    expected = tokenizer()([row["text"] for row in rows()])["input_ids"]
    assert setup.train["input_ids"][:] == expected
    assert setup.train["labels"][:] == [row % 3 for row in range(24)]
    assert setup.train.features["labels"].names == ["a", "b", "c"]
    assert setup.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert setup.evaluation is None


def test_files_are_joined_and_tabs_separate(tmp_path: Path, model: str) -> None:
    table = "text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows(number=6))
    (tmp_path / "a.tsv").write_text(table)
    args = DataArguments([str(tmp_path / "a.tsv"), write(tmp_path / "b.csv", rows())])
    train, _ = load(args, CLASSES)
    assert train["text"][:] == [row["text"] for row in rows(number=6) + rows()]


def test_numbers_are_classes_in_their_order_and_eval_files_share_them(
    tmp_path: Path, model: str
) -> None:
    data = [{"text": row["text"], "label": (9, 10, 11)[i % 3]} for i, row in enumerate(rows())]
    held_out = [{"text": "w1", "label": "10"}]
    train, evaluation = write(tmp_path / "a.csv", data), write(tmp_path / "b.json", held_out)
    setup = prepared(model, train, eval_file=[evaluation])
    assert setup.train.features["labels"].names == ["9", "10", "11"]
    assert setup.evaluation["labels"][:] == [1]
    assert len(setup.train) == 24


def test_pairs_of_texts_are_one_example(tmp_path: Path, model: str) -> None:
    data = [{"a": "w1 w2", "b": "w3", "label": "xy"[i % 2]} for i in range(8)]
    setup = prepared(
        model, write(tmp_path / "a.csv", data), text_columns=["a", "b"], eval_fraction=0
    )
    assert setup.train["input_ids"][0] == tokenizer()("w1 w2", "w3")["input_ids"]


def test_held_out_examples_are_stratified_apart_and_the_same_each_time(
    tmp_path: Path, model: str
) -> None:
    path = write(tmp_path / "a.csv", rows())
    first, second = (prepared(model, path, eval_fraction=0.25) for _ in range(2))
    assert first.evaluation["input_ids"][:] == second.evaluation["input_ids"][:]
    assert sorted(first.evaluation["labels"][:]) == [0, 0, 1, 1, 2, 2]
    every = first.train["input_ids"][:] + first.evaluation["input_ids"][:]
    assert sorted(every) == sorted(tokenizer()([r["text"] for r in rows()])["input_ids"])


def encoded(
    task: str, rows: list[Any], names: tuple[str, ...] = (), features: Any = None, **options: Any
) -> Any:
    args = DataArguments(["unused"], **{"max_length": 5, **options})
    data = Dataset.from_list(rows, features=features)
    return Encoder(task, args, tokenizer(), names).encode(data, "the examples")


def ids(text: str) -> list[int]:
    return [{"[EOS]": 2}.get(word) or 3 + WORDS.index(word) for word in text.split()]


def test_text_ends_in_end_of_text_and_is_its_own_label() -> None:
    result = encoded("causal-lm", [{"text": "w1 w2"}, {"text": "w1 w2 w3 w4 w5 w6"}])
    assert result["input_ids"][:] == [ids("w1 w2 [EOS]"), ids("w1 w2 w3 w4 w5")]
    assert result["labels"][:] == result["input_ids"][:]


def test_a_prompt_has_no_labels_and_loses_its_beginning_first() -> None:
    data = [{"text": "w1", "target": "w2"}, {"text": "w1 w2 w3 w4", "target": "w5 w6"}]
    result = encoded("causal-lm", data, target_column="target")
    # The tokenizer ends every text, the prompt included, with [EOS].
    assert result["input_ids"][:] == [ids("w1 [EOS] w2 [EOS]"), ids("w4 [EOS] w5 w6 [EOS]")]
    assert result["labels"][:] == [[-100, -100, *ids("w2 [EOS]")], [-100] * 2 + ids("w5 w6 [EOS]")]


def test_a_target_longer_than_the_limit_leaves_no_prompt() -> None:
    data = [{"text": "w1", "target": "w2 w3 w4 w5 w6 w7"}]
    result = encoded("causal-lm", data, target_column="target")
    assert result["labels"][0] == result["input_ids"][0] == ids("w2 w3 w4 w5 w6")


def test_source_and_target_are_cut_apart() -> None:
    data = [{"text": "w1 w2", "target": "w3 w4 w5 w6 w7"}]
    result = encoded("seq2seq", data, target_column="target")
    assert result["input_ids"][0] == ids("w1 w2 [EOS]")
    assert result["labels"][0] == ids("w3 w4 w5 w6 [EOS]")


def test_the_first_token_of_a_word_has_its_tag() -> None:
    # Two tokens a word, for "w1-w2" is split at "-", which is itself unknown.
    data = [{"tokens": ["w1-w2", "w3"], "label": [1, 0]}]
    features = Features(
        {"tokens": List(Value("string")), "label": List(ClassLabel(names=["O", "X"]))}
    )
    names = class_names(Dataset.from_list(data, features=features), "label", tags=True)
    result = encoded("token-classification", data, names, features, max_length=9)
    assert names == ("O", "X")
    assert result["input_ids"][0] == [*ids("w1"), 1, *ids("w2 w3 [EOS]")]
    assert result["labels"][0] == [1, -100, -100, 0, -100]


def bad(data: list[Any], **change: Any) -> list[Any]:
    """``data`` with another second row."""
    return [{**row, **change} if i == 1 else row for i, row in enumerate(data)]


# Data, options, and the words that the error must have.
ERRORS: dict[str, tuple[list[Any], dict[str, Any], list[str]]] = {
    "a missing column": (rows(), {"text_columns": "txt"}, ["'txt'", "'text'"]),
    "no such label": (rows(), {"label_column": "y"}, ["'y'", "text, label"]),
    "an empty cell": (bad(rows(), text=None), {}, ["'text'", "1 of 24", "row 2"]),
    "a blank text": (bad(rows(), text=" "), {}, ["'text'", "row 2"]),
    "a blank label": (bad(rows(), label=""), {}, ["'label'", "blank"]),
    "numbers and words": (bad(rows(), label=1), {}, ["'label'", "int, str"]),
    "no classes": ([{**r, "label": {"a": 1}} for r in rows()], {}, ["'label'", "dict"]),
    "texts and numbers": (bad(rows(), text=1), {}, ["'text'", "json"]),
    "a word among numbers": (
        bad([{**r, "label": 0.5} for r in rows()], label="high"),
        {"task": "regression"},
        ["'label'", "row 2", "'high'"],
    ),
    "the label as text": (rows(), {"text_columns": ["text", "label"]}, ["'label'", "twice"]),
    "a class once": (bad(rows(), label="d"), {}, ["'d'", "once"]),
    "one class": ([{**r, "label": "a"} for r in rows()], {}, ["'a'"]),
    "fractions as classes": (
        [{**r, "label": 0.5} for r in rows()],
        {},
        ["'label'", "float64", "regression"],
    ),
    "text as numbers": (rows(), {"task": "regression"}, ["'label'", "string", "row 1", "'a'"]),
    "numbers as text": (
        [{"text": 1, "label": "ab"[i % 2]} for i in range(8)],
        {},
        ["'text'", "int64"],
    ),
    "texts as words": (
        rows(),
        {"task": "token-classification", "tokens_column": "text"},
        ["'label'", "string", "lists"],
    ),
    "no target": ([{"text": "w1"}], {"task": "seq2seq"}, ["seq2seq", "target_column"]),
    "three texts": (rows(), {"text_columns": ["a", "b", "c"]}, ["text_columns", "a, b, c"]),
    "too few to hold out": (rows(number=9), {"eval_fraction": 0.1}, ["eval_fraction=0.1"]),
    "long examples": (rows(), {"max_length": 600}, ["max_length=600", "512"]),
    "no examples": (rows(), {"eval_file": "none.csv"}, ["eval_file", "none.csv"]),
}


# An older datasets cannot read them at all.
MIXED = ("numbers and words", "texts and numbers", "a word among numbers")


@pytest.mark.parametrize("case", ERRORS)
def test_bad_data_is_one_line_that_names_it(
    tmp_path: Path, model: str, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, options, named = ERRORS[case]
    if case in MIXED and not hasattr(datasets, "Json"):
        named = ("one type",)
    path = write(tmp_path / "a.json", data)
    given = {"model": model, "task": CLASSES, "train_file": path, "max_length": 16, **options}
    error = failure(capsys, "train", *flags(**given))
    assert all(word in error for word in named), error


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.csv", "", "empty"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.json", '{"text": ', "cannot read"),
        ("a.xls", "x", ".parquet"),
        ("a.parquet", "x", "cannot read"),
    ],
)
def test_bad_files_are_one_line_that_names_them(
    tmp_path: Path,
    model: str,
    name: str,
    text: str,
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_text(text)
    given = {"model": model, "task": CLASSES, "train_file": path}
    error = failure(capsys, "train", *flags(**given))
    assert "train_file" in error and name in error and named in error


def test_another_encoding_is_one_line(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nna\xefve,a\n".encode("latin-1"))
    error = failure(capsys, "train", *flags(model=model, task=CLASSES, train_file=path))
    assert "a.csv" in error and "UTF-8" in error


def test_another_separator_is_named(tmp_path: Path, model: str) -> None:
    (tmp_path / "a.csv").write_text("text;label\nw1;a\n")
    with pytest.raises(ProblemError, match=r"text;label.*CSV.*commas"):
        prepared(model, str(tmp_path / "a.csv"))


def test_words_for_nothing_are_classes_and_texts(tmp_path: Path, model: str) -> None:
    names = ["NA", "None", "null"]
    table = "".join(f"{['n/a', 'w1'][i % 2]},{names[i % 3]}\n" for i in range(24))
    (tmp_path / "a.csv").write_text(f"text,label\n{table}")
    setup = prepared(model, str(tmp_path / "a.csv"), eval_fraction=0)
    assert setup.train.features["labels"].names == names
    assert setup.train["input_ids"][1] == ids("w1 [EOS]")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "train_file.*dataset"),
        ({"train_file": ["a"], "dataset": "b"}, "train_file.*dataset"),
        ({"train_file": ["a"], "eval_split": "b"}, "eval_split.*dataset"),
        ({"train_file": ["a"], "eval_file": ["./a"]}, "eval_file.*./a.*train_file"),
        ({"dataset": "a", "eval_split": "train"}, "eval_split.*train_split"),
        ({"dataset": "a", "eval_split": "b", "eval_file": ["c"]}, "eval_split.*eval_file"),
        ({"train_file": ["a"], "eval_fraction": 1.0}, "eval_fraction.*1.0"),
        ({"train_file": ["a"], "max_length": 1}, "max_length.*1"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        DataArguments(**options)


def test_an_unknown_label_of_the_evaluation_is_named(tmp_path: Path, model: str) -> None:
    train = write(tmp_path / "a.csv", rows())
    held_out = write(tmp_path / "b.csv", [{"text": "w1", "label": "e"}])
    with pytest.raises(ProblemError, match=r"evaluation examples.*'e'"):
        prepared(model, train, eval_file=[held_out])


def test_evaluation_on_training_examples_is_warned_of(
    tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    train, others = write(tmp_path / "a.csv", rows()), rows(number=5, seed=1)
    prepared(model, train, eval_file=[write(tmp_path / "b.csv", others)])
    assert "evaluation examples" not in caplog.text
    prepared(model, train, eval_file=[write(tmp_path / "c.csv", [*others, *rows()[:2]])])
    assert "2 of 7 evaluation examples" in caplog.text


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_label_that_is_not_finite_is_named(value: float) -> None:
    data = [{"text": "w1", "label": 0.5}, {"text": "w2", "label": value}]
    with pytest.raises(ProblemError, match=f"the examples.*row 2.*{value}"):
        encoded("regression", data)


def test_an_empty_word_is_named() -> None:
    data = [{"tokens": ["w1", None], "label": ["O", "O"]}]
    with pytest.raises(ProblemError, match=r"the examples.*row 1.*empty word"):
        encoded("token-classification", data, ("O",))


def test_words_and_tags_must_be_as_many() -> None:
    data = [{"tokens": ["w1", "w2"], "label": ["O"]}]
    with pytest.raises(ProblemError, match=r"the examples.*row 1.*2 words and 1 tags"):
        encoded("token-classification", data, ("O",))


def test_an_example_without_a_token_to_predict_is_named() -> None:
    data = [{"text": "w1 w2"}, {"text": ""}]
    with pytest.raises(ProblemError, match="row 2"):
        encoded("causal-lm", data)


def test_local_folder_of_a_data_set(tmp_path: Path, model: str) -> None:
    for split, number in (("train", 24), ("validation", 6)):
        write(tmp_path / f"{split}.jsonl", rows(number=number))
    args = DataArguments(dataset=str(tmp_path), eval_split="validation")
    train, evaluation = load(args, CLASSES)
    assert (len(train), len(evaluation)) == (24, 6)
    with pytest.raises(ProblemError, match="tset"):
        load(DataArguments(dataset=str(tmp_path), eval_split="tset"), CLASSES)
    with pytest.raises(ProblemError, match=r"no/such.*train|train.*no/such"):
        load(DataArguments(dataset="no/such"), CLASSES)


def test_regression_is_held_out_without_strata() -> None:
    data = Dataset.from_dict({"labels": [0.5 * i for i in range(10)]})
    rest, held_out = hold_out(data, 0.2)
    assert (len(rest), len(held_out)) == (8, 2)
    assert sorted(rest["labels"][:] + held_out["labels"][:]) == data["labels"][:]


def test_tokenizer_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    path = write(tmp_path / "a.csv", rows())
    given = {"model": model, "task": CLASSES, "train_file": path, "max_length": 16}
    error = failure(capsys, "train", *flags(**given))
    assert "43" in error and "40" in error and "tokenizer" in error


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (b"text,label\nw1,a\nw2\rw3,b\nw4,a\n", 2),
        (b"text,label\r\nw1,a\r\nw2,b\r\nw3\r,b\r\n", 3),
        (b'text,label\n"w1\nw1",a\nw2\rw3,b\n', 2),
    ],
)
def test_a_carriage_return_within_a_row_is_named(tmp_path: Path, table: bytes, row: int) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(table)
    with pytest.raises(ProblemError, match=rf"train_file: .*a\.csv.* row {row} "):
        load(DataArguments([str(path)]), CLASSES)


@pytest.mark.parametrize(
    "table",
    [b'text,label\n"w1\rw1",a\nw2,b\n', b"text,label\rw1,a\rw2,b\r", b"text,label\r\nw1,a\r\nw2,b"],
)
def test_carriage_returns_in_quotes_and_at_line_ends_are_read(tmp_path: Path, table: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(table)
    train, _ = load(DataArguments([str(path)]), CLASSES)
    assert train["label"][:] == ["a", "b"]
