"""Options from YAML and flags are read by the same rules; errors name file, option and line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from hyperopt_peft import ProblemError
from hyperopt_peft.cli.options import parse, require_folder
from hyperopt_peft.cli.text.setup import TYPES

REQUIRED = ["--model", "m", "--task", "causal-lm", "--train_file", "t.csv", "--use_cpu"]


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
    (options,) = parse("train", (Options,), argv)
    assert isinstance(options, Options)
    return options


def yaml(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_yaml_and_flags_give_the_same(tmp_path: Path) -> None:
    text = "rate: 1e-3\nwords: [x, y]\nactive: false\nquiet: true\nname-of-it: it\n"
    by_flags = read(
        "--rate", "1e-3", "--words", "x", "y", "--no_active", "--quiet", "--name-of-it=it"
    )
    assert read(yaml(tmp_path, text)) == by_flags == Options(1e-3, ["x", "y"], False, True, "it")


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = yaml(tmp_path, "rate: 2\nwords: x\nname_of_it: -3\n")
    assert read(file, "--words", "z", "--rate", "3") == Options(3.0, ["z"], name_of_it="-3")


def test_null_leaves_the_default(tmp_path: Path) -> None:
    assert read(yaml(tmp_path, "rate: null\nname_of_it: null")) == Options()


def test_mapping_reaches_training_arguments(tmp_path: Path) -> None:
    file = yaml(tmp_path, "lr_scheduler_kwargs: {num_cycles: 2}\nreport_to: none")
    *_, args = parse("train", TYPES, [file, *REQUIRED])
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert isinstance(args, TrainingArguments) and args.report_to == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rat: 2", ["'rat'", "'rate'"]),
        ("zzz: 2", ["'zzz'", "--help"]),
        ("help: 2", ["'help'"]),
        ("rate: [1, 2]", ["rate", "[1, 2]"]),
        ("rate: fast", ["--rate", "'fast'"]),
        ("rate: -1", ["rate"]),
        ("rate: 1\nwords: [a]\nrate: 2", ["rate", "line 1", "line 3"]),
        ("- rate", ["name: value"]),
        ("", ["name: value"]),
        ("rate: [", ["YAML"]),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, named: list[str]) -> None:
    with pytest.raises(ProblemError) as error:
        read(yaml(tmp_path, text))
    assert all(word in str(error.value) for word in named), error.value


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--rat", "2"], ["--rat", "'rate'"]),
        (["--name_of-it=2"], ["--name_of-it"]),
        (["--wor", "2"], ["--wor"]),  # no abbreviations: they change with versions
        (["--rate"], ["--rate"]),
        (["--rate", "2", "c.yaml"], ["c.yaml", "before the options"]),
        (["--quiet", "c.yaml"], ["c.yaml", "before the options"]),
        (["missing.yaml"], ["missing.yaml"]),
    ],
)
def test_bad_flags_are_refused(argv: list[str], named: list[str]) -> None:
    with pytest.raises(ProblemError) as error:
        read(*argv)
    assert all(word in str(error.value) for word in named), error.value


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (REQUIRED[2:], "--model"),
        ([*REQUIRED, "--learning_rat", "1"], "'learning_rate'"),
        ([*REQUIRED, "--hypergradient", "dart"], "'darts'"),
        ([*REQUIRED, "--load_best_model_at_end"], "eval strategy"),
        ([*REQUIRED, "--method", "bidorra"], "--method"),
        ([*REQUIRED, "--rank", "0"], "rank"),
        ([*REQUIRED, "--dropout", "1"], "dropout"),
        ([*REQUIRED, "--dtype", "float8"], "--dtype"),
    ],
)
def test_the_dataclasses_own_checks_are_problem_errors(argv: list[str], named: str) -> None:
    with pytest.raises(ProblemError) as error:
        parse("train", TYPES, argv)
    assert named in str(error.value)


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_an_output_dir_that_is_or_lies_in_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    require_folder(str(tmp_path / "new/folder"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ProblemError, match=r"output_dir.*file"):
        require_folder(str(tmp_path / below))


def test_every_option_has_help() -> None:
    from dataclasses import fields

    modules: list[Any] = [*map(_module, ("train", "compare_methods", "compare_estimators"))]
    modules += [*map(_module, ("check", "merge"))]
    owned = [own for module in modules for own in vars(module).values() if _is_options(own)]
    assert len({own.__name__ for own in owned}) == 5
    for own in (*owned, *TYPES):
        assert all(field.metadata.get("help") for field in fields(own) if field.init)


def _module(name: str) -> Any:
    from importlib import import_module

    return import_module(f"hyperopt_peft.cli.{name}")


def _is_options(value: Any) -> bool:
    return isinstance(value, type) and getattr(value, "_argument_group_name", "") == "command"
