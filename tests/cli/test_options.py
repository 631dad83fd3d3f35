"""Options from YAML and flags are read by the same rules; errors name file and option."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from hyperopt_peft import ProblemError
from hyperopt_peft.cli import COMMANDS
from hyperopt_peft.cli.listing import FILE, listing, names_of, training_names
from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.text.setup import SHARED
from tests.support.cli import refused
from tests.support.files import flags
from tests.support.listing import collected, written


@dataclass
class Options:
    rate: float = HfArg(default=1.0, help="-")
    words: list[str] = HfArg(default_factory=lambda: ["a"], help="-")
    active: bool = HfArg(default=True, help="-")
    quiet: bool = HfArg(default=False, help="-")
    name_of_it: str | None = HfArg(default=None, help="-")

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("rate is negative")


def read(*argv: str) -> Options:
    (options,), _ = parse("train", (Options,), argv)
    assert isinstance(options, Options)
    return options


def yaml(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "argv", "options"),
    [
        (
            "rate: 1e-3\nwords: [x, y]\nactive: false\nquiet: true\nname-of-it: it\n",
            [],
            Options(1e-3, ["x", "y"], False, True, "it"),
        ),
        (
            "",
            ["--rate", "1e-3", "--words", "x", "y", "--no_active", "--quiet", "--name-of-it=it"],
            Options(1e-3, ["x", "y"], False, True, "it"),
        ),
        ("rate: 2\nwords: x", ["--words", "z", "--rate", "3"], Options(3.0, ["z"])),
        ("name_of_it: -3", [], Options(name_of_it="-3")),
        ("rate: null\nname_of_it: null", [], Options()),
    ],
)
def test_a_file_and_flags_which_override_it(
    tmp_path: Path, text: str, argv: list[str], options: Options
) -> None:
    assert read(*([yaml(tmp_path, text)] if text else []), *argv) == options


def test_a_mapping_reaches_training_arguments(tmp_path: Path) -> None:
    file = yaml(tmp_path, "lr_scheduler_kwargs: {num_cycles: 2}\nreport_to: none")
    (*_, args), _ = parse(
        "train", SHARED, [file, *flags(model="m", task="causal-lm", train_file="t", use_cpu=True)]
    )
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert isinstance(args, TrainingArguments) and args.report_to == []


def test_one_file_serves_all_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mapping under a command's name is of that command; an option of another one is not read."""
    text = "rate: 2\nmethod: lora\ntrain: {rate: 3, words: [x]}\ncheck: {rate: 4, nonsense: 1}"
    assert read(yaml(tmp_path, "rate: 2\ntrain: {rate: 3, words: [x]}")) == Options(3, ["x"])
    parsed, flags = parse("merge", (Options,), [yaml(tmp_path, text), "--quiet"])
    assert parsed == [Options(2.0, quiet=True)] == parse("merge", (Options,), flags)[0]
    assert "method: of other" in capsys.readouterr().err
    with pytest.raises(ProblemError, match=r"--method: an option of train, .*; leave it out"):
        parse("merge", (Options,), ["--method", "lora"])
    with pytest.raises(ProblemError, match="unknown option --nonsense"):
        parse("check", (Options,), [yaml(tmp_path, text)])


@pytest.mark.parametrize(
    ("text", "argv", "words"),
    [
        ("rat: 2", [], ["--rat;", "'rate'"]),
        ("zzz: 2", [], ["--zzz", "--help"]),
        ("help: 2", [], ["help"]),
        ("rate: [1, 2]", [], ["'2'", "unexpected"]),
        ("rate: fast", [], ["--rate", "'fast'"]),
        ("rate: -1", [], ["rate is negative"]),
        ("- rate", [], ["config.yaml", "name: value"]),
        ("rate: [", [], ["config.yaml", "YAML"]),
        ("", ["--rat", "2"], ["--rat;", "'rate'"]),
        ("", ["--name_of-it=2", "--na=3"], ["--na"]),
        ("", ["--wor", "2"], ["--wor"]),  # no abbreviations: they change with versions
        ("", ["--rate"], ["--rate"]),
        ("", ["--rate", "2", "c.yaml"], ["'c.yaml'", "YAML file first"]),
        ("", ["missing.yaml"], ["missing.yaml: there is no such file"]),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path, text: str, argv: list[str], words: list[str]
) -> None:
    with pytest.raises(ProblemError) as error:
        read(*([yaml(tmp_path, text)] if text else []), *argv)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("train", {"model": None}, "--model"),
        ("train", {"learning_rat": 1}, "'learning_rate'"),
        ("train", {"hypergradient": "dart"}, "'darts'"),
        ("train", {"load_best_model_at_end": True}, "eval strategy"),
        ("train", {"method": "bidorra"}, "--method"),
        ("train", {"dropout": 1}, "dropout: "),
        ("train", {"alpha": 0}, "alpha, "),
        ("train", {"dtype": "float8"}, "--dtype"),
        ("train", {"dataset": "b"}, "train_file: give either train_file or dataset"),
        ("train", {"train_file": None}, "train_file: give either train_file or dataset"),
        ("train", {"eval_split": "b"}, "eval_split: is of a dataset"),
        ("train", {"task": "sft"}, "task: sft is of attribute"),
        ("train", {"load_in_4bit": True, "task": "seq2seq"}, "load_in_4bit: .*got task seq2seq"),
        ("compare", {"methods": ["lora", "bidorra"]}, "'bidora'"),
        ("compare", {"methods": ["damping=1.0"]}, "quotes"),
        ("compare", {"methods": ["lora:cg"]}, "'lora:cg'"),
        ("compare", {"methods": ["bidora:dart"]}, "'darts'"),
        ("check", {"estimators": ["drts"]}, "'drts'.*'darts'"),
        ("check", {"reference": "exakt"}, "'exakt'.*'exact'"),
        ("check", {"reference": "retraining:steps=0"}, "retraining.*steps.*0"),
        ("check", {"search_steps": -1}, "search_steps.*-1"),
        ("check", {"solver_steps": 0}, "solver_steps.*0"),
        ("check", {"resume_from_checkpoint": "true"}, "resume_from_checkpoint: .*not resume"),
        ("compare", {"resume_from_checkpoint": "true"}, "resume_from_checkpoint: .*not resume"),
        ("attribute", {"estimator": "unroled"}, "'unroled'.*unrolled"),
        ("attribute", {"estimator": "darts"}, "darts gives no score for each row"),
        ("attribute", {"check": 2}, "check.*at least 5"),
        ("attribute", {"suspects": 1}, "suspects.*at least 2"),
        ("attribute", {"suspects": 3}, "suspects: needs a class label per row; causal-lm has none"),
        ("attribute", {"retrain_without": 1.5}, "retrain_without.*1.5"),
        ("attribute", {"weight_column": "weight"}, "weight_column"),
    ],
)
def test_bad_options_are_one_line_before_any_work(
    command: str, changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model": "none", "task": "causal-lm", "train_file": "none.csv", **changes}
    refused(capsys, command, {k: v for k, v in options.items() if v is not None}, words)


def test_the_listing_is_that_of_the_classes() -> None:
    """Else run ``python -m tests.support.listing``; each option has a help."""
    assert FILE.read_text() == written(collected())
    rows = [row for groups in listing().values() for options in groups.values() for row in options]
    assert all(name and text for name, _, _, text in rows)
    assert training_names() == {field.name for field in fields(TrainingArguments)}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_option_of_a_command_once(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"hyperopt-peft {command} " in text and COMMANDS[command] in text
    heads = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    own = [row[0] for options in listing()[command].values() for row in options]
    assert heads == own and len({*heads}) == len(heads)
    assert text.count("\n") < 160
    assert main([command, "--help_all"]) == 0
    assert {*re.findall(r"\w+", capsys.readouterr().out)} >= names_of(command)
