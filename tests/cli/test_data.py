"""Files are read alike in every format; what cannot be trained on is named before any work."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value, config

from hyperopt_peft import ProblemError
from hyperopt_peft.cli.text.data import DataArguments, read_files
from hyperopt_peft.cli.text.encode import Encoder, class_names
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.setup import Setup, prepare
from tests.support.cli import Capture, refused
from tests.support.files import WORDS, rows, save_model, tokenizer, write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model")))


def prepared(model: str, path: str, **options: Any) -> Setup:
    args = ModelArguments(model, "text-classification")
    return prepare(args, DataArguments([path], max_length=16, **options), None)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
def test_every_format_holds_the_same_examples(tmp_path: Path, model: str, name: str) -> None:
    setup = prepared(model, write(tmp_path / name, rows()), eval_fraction=0)
    expected = tokenizer()([row["text"] for row in rows()])["input_ids"]
    assert setup.train["input_ids"][:] == expected and setup.evaluation is None
    assert setup.train["labels"][:] == [row % 3 for row in range(24)]
    assert setup.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_files_are_joined_tabs_separate_and_the_user_s_cache_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = "text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows(number=6))
    (tmp_path / "a.tsv").write_text(table)
    files = [str(tmp_path / "a.tsv"), write(tmp_path / "b.csv", rows())]
    read = read_files(files, "train_file")
    assert read["text"][:] == [row["text"] for row in rows(number=6) + rows()]
    Encoder("causal-lm", DataArguments(files), tokenizer()).encode(read, "the examples")
    assert not (tmp_path / "cache").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a.tsv", "b.csv"}


def test_numbers_are_classes_in_their_order_and_eval_files_share_them(
    tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Evaluation on training examples is warned of."""
    data = [{"text": row["text"], "label": (9, 10, 11)[i % 3]} for i, row in enumerate(rows())]
    train = write(tmp_path / "a.csv", data)
    others = write(tmp_path / "b.json", [{"text": "w1", "label": "10"}])
    setup = prepared(model, train, eval_file=[others])
    assert setup.train.features["labels"].names == ["9", "10", "11"] and len(setup.train) == 24
    assert setup.evaluation is not None and setup.evaluation["labels"][:] == [1]
    assert "evaluation examples" not in caplog.text
    known = write(tmp_path / "c.csv", [*data[:2], data[5] | {"label": 9}])
    prepared(model, train, eval_file=[known])
    assert "2 of 3 evaluation examples" in caplog.text


def test_held_out_examples_are_stratified_apart_and_the_same_each_time(
    tmp_path: Path, model: str
) -> None:
    """And a row that comes twice is on one side."""
    twice = write(tmp_path / "b.csv", [*rows(), *rows()])
    parts = prepared(model, twice, eval_fraction=0.25)
    assert parts.evaluation is not None and len(parts.evaluation) == 12
    seen = set(map(tuple, parts.train["input_ids"][:]))
    assert seen.isdisjoint(map(tuple, parts.evaluation["input_ids"][:]))
    path = write(tmp_path / "a.csv", rows())
    first, second = (prepared(model, path, eval_fraction=0.25) for _ in range(2))
    assert first.evaluation is not None and second.evaluation is not None
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
    """The tokens of words, and -100 for the word ``-``."""
    return [{"[EOS]": 2, "-": -100}.get(word) or 3 + WORDS.index(word) for word in text.split()]


# Task, row, and the words of the inputs and of the labels, with "-" for none.
ENCODINGS = [
    ("causal-lm", {"text": "w1 w2"}, "w1 w2 [EOS]", "w1 w2 [EOS]"),
    ("causal-lm", {"text": "w1 w2 w3 w4 w5 w6"}, "w1 w2 w3 w4 w5", None),
    # The tokenizer ends every text, the prompt included, with [EOS].
    ("causal-lm", {"text": "w1", "target": "w2"}, "w1 [EOS] w2 [EOS]", "- - w2 [EOS]"),
    (
        "causal-lm",
        {"text": "w1 w2 w3 w4", "target": "w5 w6"},
        "w4 [EOS] w5 w6 [EOS]",
        "- - w5 w6 [EOS]",
    ),
    ("causal-lm", {"text": "w1", "target": "w2 w3 w4 w5 w6 w7"}, "w2 w3 w4 w5 w6", None),
    ("seq2seq", {"text": "w1 w2", "target": "w3 w4 w5 w6 w7"}, "w1 w2 [EOS]", "w3 w4 w5 w6 [EOS]"),
]


@pytest.mark.parametrize(("task", "row", "inputs", "labels"), ENCODINGS)
def test_tokens_and_labels_of_language(
    task: str, row: dict[str, str], inputs: str, labels: str | None
) -> None:
    target = "target" if "target" in row else None
    result = encoded(task, [row], target_column=target)
    assert result["input_ids"][0] == ids(inputs)
    assert result["labels"][0] == ids(labels or inputs)


def test_the_first_token_of_a_word_has_its_tag() -> None:
    # Two tokens a word, for "w1-w2" is split at "-", which is itself unknown.
    data = [{"tokens": ["w1-w2", "w3"], "label": [1, 0]}]
    features = Features(
        {"tokens": List(Value("string")), "label": List(ClassLabel(names=["O", "X"]))}
    )
    names = class_names(Dataset.from_list(data, features=features), "label")
    result = encoded("token-classification", data, names, features, max_length=9)
    assert names == ("O", "X")
    assert result["input_ids"][0] == [*ids("w1"), 1, *ids("w2 w3 [EOS]")]
    assert result["labels"][0] == [1, -100, -100, 0, -100]


def bad(data: list[Any], **change: Any) -> list[Any]:
    """``data`` with another second row."""
    return [{**row, **change} if i == 1 else row for i, row in enumerate(data)]


AS_WORDS = [{**row, "label": "0.5"} for row in rows()]
NUMBERS = [{**row, "label": 0.5} for row in rows()]
WORD_ROWS = [{"tokens": ["w1", "w2"], "label": ["O", "B"]}] * 3
REGRESSION, TAGGING = {"task": "regression"}, {"task": "token-classification"}
# Data, options, and the words that the error has.
ERRORS: list[tuple[list[Any], dict[str, Any], str]] = [
    (rows(), {"text_columns": "txt"}, "'txt'.*'text'"),
    (rows(), {"text_columns": "label"}, "one of label, label is given twice"),
    (rows(), {**TAGGING, "tokens_column": "label"}, "one of label, label is given twice"),
    (rows(), {"label_column": "True"}, "no column 'True'.* quotes around yes and no"),
    (bad(rows(), text=None), {}, r"'text' .* 1 of 24 .*row 1 \(from 0\)"),
    (bad(rows(), text=" "), {}, r"row 1 \(from 0\).*'text'"),
    (bad(rows(), label=""), {}, r"'label'.*\[''\] are blank"),
    ([{**r, "label": "a"} for r in rows()], {}, "'label' has one class"),
    ([{**r, "label": {"a": 1}} for r in rows()], {}, "'label'.*dict"),
    (bad(AS_WORDS, label="x"), REGRESSION, "row 1.*'x'"),
    (bad(AS_WORDS, label="-inf"), REGRESSION, "row 1.* '-inf' is no finite"),
    (bad(rows(), label="d"), {}, "eval_fraction: .*the class 'd' has 1 row"),
    (bad(rows(), label="b "), {}, "'b', 'b '. are blank or differ by spaces"),
    (rows(), {"eval_file": ""}, "eval_file: '' has no known format"),
    (rows(), {"eval_file": "other"}, "evaluation examples: row 0 .*'e'"),
    (NUMBERS, {}, "'label'.*float.*regression"),
    ([{"text": 1, "label": "ab"[i % 2]} for i in range(8)], {}, "'text' has 1"),
    (rows(), {**TAGGING, "tokens_column": "text"}, "row 0.*lists of words"),
    (bad(WORD_ROWS, label=["O"]), TAGGING, "row 1.*of one length"),
    ([{"text": "w1"}], {"task": "seq2seq"}, "target_column.*seq2seq"),
    (rows(), {"text_columns": ["a", "b", "c"]}, "text_columns.*a, b, c"),
    (rows(), {"max_length": 600}, "max_length.*512.*600"),
    (rows(), {"tokenizer": "large"}, "tokenizer: .*43 tokens, the model 40"),
]


@pytest.mark.parametrize(("data", "options", "words"), ERRORS)
def test_bad_data_is_one_line_that_names_it(
    tmp_path: Path,
    model: str,
    data: list[Any],
    options: dict[str, Any],
    words: str,
    capsys: Capture,
) -> None:
    path = write(tmp_path / "a.json", data)
    options = {"task": "text-classification", "max_length": 16, "model": model, **options}
    if options.get("eval_file"):
        options["eval_file"] = write(tmp_path / "b.csv", [{"text": "w1", "label": "e"}])
    if options.pop("tokenizer", None):
        options["model"] = save_model(tmp_path / "model")
        settings = json.loads((tmp_path / "model/config.json").read_text())
        (tmp_path / "model/config.json").write_text(json.dumps({**settings, "vocab_size": 40}))
    refused(capsys, "train", {"train_file": path, "dry_run": True, **options}, words)


# What a file holds, and the words that the error has beside its name.
FILES: dict[str, tuple[bytes, str]] = {
    "missing.csv": (b"", "there is no file"),
    "nothing.csv": (b"", "no rows"),
    "header.csv": (b"text,label\n", "no rows"),
    "broken.json": (b'{"text": ', "cannot be read: JSON parse error"),
    "broken.parquet": (b"x", "cannot be read"),
    "table.xls": (b"x", r"\.parquet"),
    "latin.csv": ("text,label\nna\xefve,a\n".encode("latin-1"), "UTF-8"),
    "twice.csv": (b"text,label,label\nw1,a,a\n", "two columns 'label'"),
    "blank.csv": (b"\n\n", "no rows"),
    "quote.csv": (b'text,label\nw1,a\n"w1,a\nw2,b\n', "line 3 has a quote that is not closed"),
    # Read as two rows, of which the first has three lines.
    "merged.csv": (b'text,label\n"w1,a\nw2,b\n"w3",a\nw4,b\n', "line 2 has a quote .* not closed"),
    "inner.tsv": (b'text\tlabel\nw1\ta\n"w1" w2\tb\n', "line 3 has a quote .* within a text"),
    "long.csv": (b'text,label\n"w1\nw2",a\nw2,b,c\n', "line 4 has 3 cells .* with a comma"),
    # pandas would read the first column as an index, and the second as the text.
    "first.csv": (b"text,label\nw1, w2,a\nw2,b\n", "line 2 has 3 cells .* with a comma"),
    "excel.csv": (b"PK\x03\x04 cut off", "is an Excel or zip file; export it as CSV"),
    "utf-16.csv": ("text,label\nw1,a\n".encode("utf-16"), "UTF-8"),
    "short.csv": (b"text,label\nw1,a\nw2\nw3,c\n", r"'label' is empty.*row 1 \(from 0\)"),
    "marks.csv": (b"text;label\nw1, w2;a\nw2, w3, w4;b\n", "';' between"),
    "bars.tsv": (b"text|label\nw1|a\n", r"'\|' between .*'\\t'"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files_are_one_line_that_names_them(
    tmp_path: Path, model: str, name: str, capsys: Capture
) -> None:
    content, words = FILES[name]
    if name != "missing.csv":
        (tmp_path / name).write_bytes(content)
    options = {"model": model, "task": "text-classification", "train_file": tmp_path / name}
    named = "training examples" if name == "short.csv" else f"train_file: .*{name}"
    refused(capsys, "train", {"dry_run": True, **options}, named, words)


def test_empty_cells_after_the_last_column_and_long_texts_are_read(tmp_path: Path) -> None:
    long = "w1 " * 70_000  # above the limit of Python's csv
    (tmp_path / "a.csv").write_text(f'text,label\n"{long}, ""w2""\n",a,\n\nw2,b,\n')
    read = read_files([str(tmp_path / "a.csv")], "train_file")
    assert read.to_dict() == {"text": [f'{long}, "w2"\n', "w2"], "label": ["a", "b"]}


def test_files_with_other_columns_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [write(tmp_path / "a.csv", rows()), write(tmp_path / "b.csv", [{"txt": "w1"}])]
    assert read_files(files, "train_file").column_names == ["text", "label", "txt"]
    first, second = caplog.messages
    assert "a.csv has no column txt" in first and "b.csv has no column label, text" in second


@pytest.mark.parametrize(
    ("text", "label", "words"),
    [
        ("w9", "B", [r"'B' \(1 rows\), 'b' \(8 rows\) differ in case"]),
        (rows()[2]["text"], "a", [r"2 training examples .*: rows 2 and 24 \(from 0\)"]),
        (rows()[2]["text"], "c", []),  # a row that is there twice
    ],
)
def test_labels_that_look_wrong_are_warned_of(
    tmp_path: Path,
    model: str,
    text: str,
    label: str,
    words: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A class in two spellings, and a text with two labels."""
    data = [*rows(), {"text": text, "label": label}]
    prepared(model, write(tmp_path / "a.csv", data), eval_fraction=0)
    assert all(re.search(*pair) for pair in zip(words, caplog.messages, strict=True))


def test_words_for_nothing_are_classes_and_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nn/a,NA\nnull,None\n")
    read = read_files([str(tmp_path / "a.csv")], "train_file")
    assert read.to_dict() == {"text": ["n/a", "null"], "label": ["NA", "None"]}


def test_local_folder_of_a_data_set(tmp_path: Path) -> None:
    for split, number in (("train", 24), ("validation", 6)):
        write(tmp_path / f"{split}.jsonl", rows(number=number))
    train, _, evaluation = DataArguments(dataset=str(tmp_path), eval_split="validation").read()
    assert evaluation is not None and (len(train), len(evaluation)) == (24, 6)
    with pytest.raises(ProblemError, match="tset"):
        DataArguments(dataset=str(tmp_path), train_split="tset").read()
