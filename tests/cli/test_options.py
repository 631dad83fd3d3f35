"""Options from YAML and flags are read by the same rules; errors name file and option."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from hyperopt_peft import ProblemError
from hyperopt_peft.cli import COMMANDS
from hyperopt_peft.cli.main import main
from hyperopt_peft.cli.options import flags_of, names_of, parse
from hyperopt_peft.cli.text.setup import SHARED
from hyperopt_peft.method import option
from tests.support.cli import Capture, refused
from tests.support.files import flags


@dataclass
class Options:
    rate: float = option(1.0, help="-")
    words: list[str] = option(default_factory=lambda: ["a"], help="-")
    active: bool = option(True, help="-")
    quiet: bool = option(False, help="-")
    name_of_it: str | None = option(None, help="-")

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


EVERY = Options(1e-3, ["x", "y"], False, True, "it")


@pytest.mark.parametrize(
    ("text", "argv", "options"),
    [
        ("rate: 1e-3\nwords: [x, y]\nactive: false\nquiet: true\nname-of-it: it\n", "", EVERY),
        ("", "--rate 1e-3 --words x y --no_active --quiet --name-of-it=it", EVERY),
        ("rate: 2\nwords: x", "--words z --rate 3", Options(3.0, ["z"])),
        ("name_of_it: -3", "", Options(name_of_it="-3")),
        ("rate: null\nname_of_it: null", "", Options()),
        ("rate: 2\ntrain: {rate: 3}\ncheck: {rate: 4, nonsense: 1}", "", Options(3.0)),
    ],
)
def test_a_file_and_flags_which_override_it(
    tmp_path: Path, text: str, argv: str, options: Options
) -> None:
    assert read(*([yaml(tmp_path, text)] if text else []), *argv.split()) == options


def test_a_mapping_reaches_training_arguments(tmp_path: Path) -> None:
    file = yaml(tmp_path, "lr_scheduler_kwargs: {num_cycles: 2}\nreport_to: none")
    needed = flags(model="m", task="causal-lm", train_file="t", use_cpu=True)
    (*_, args), _ = parse("train", SHARED, [file, *needed])
    assert args.lr_scheduler_kwargs == {"num_cycles": 2} and args.report_to == []


def test_one_file_serves_all_commands(tmp_path: Path) -> None:
    """An option of another command is not read; what was read gives the same again."""
    parsed, given = parse(
        "attribute", (Options,), [yaml(tmp_path, "rate: 2\nmethod: lora"), "--quiet"]
    )
    assert parsed == [Options(2.0, quiet=True)]
    assert parse("attribute", (Options,), flags_of({"rate": ["2"], "quiet": []}))[0] == parsed
    assert given == {"rate": ["2"], "method": ["lora"], "quiet": []}


@pytest.mark.parametrize(
    ("text", "argv", "words"),
    [
        ("rat: 2", "", "--rat; .*'rate'"),
        ("zzz: 2", "", "--zzz; --help"),
        ("rate: [1, 2]", "", "'2': unexpected"),
        ("rate: fast", "", "--rate.*'fast'"),
        ("rate: -1", "", "rate is negative"),
        ("rate: 1\nquiet: true\nrate: 2", "", "config.yaml: line 3: rate is given twice"),
        ("train: {name_of_it: a,\n  name-of-it: b}", "", "line 2: name_of_it is given twice"),
        ("- rate", "", "config.yaml: no mapping.*name: value"),
        ("rate: [", "", "config.yaml: no readable YAML"),
        ("", "--name_of-it=2 --na=3", "--na"),
        ("", "--wor 2", "--wor"),  # no abbreviations: they change with versions
        ("", "--rate", "--rate"),
        ("", "--rate 2 c.yaml", "'c.yaml': .*YAML file first"),
        ("", "missing.yaml", "missing.yaml: no readable YAML .*No such file"),
        ("", "--methods lora", "--methods: is for compare, .*; leave it out"),
        ("", "--gamma 1", "--gamma: is for bidora, "),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, text: str, argv: str, words: str) -> None:
    with pytest.raises(ProblemError, match=f"(?s){words}"):
        read(*([yaml(tmp_path, text)] if text else []), *argv.split())


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("train", {"model": None}, "--model"),
        ("train", {"learning_rat": 1}, "'learning_rate'"),
        ("train", {"hypergradient": "dart"}, "'darts'"),
        ("train", {"load_best_model_at_end": True}, "eval strategy"),
        ("train", {"dtype": "float8"}, "--dtype"),
        ("train", {"dataset": "b"}, "train_file: give either train_file or dataset"),
        ("train", {"max_steps": 0}, "max_steps must be positive.* got 0 with 3"),
        ("train", {"retrain_arguments": {"max_steps": 0}}, "retrain_arguments: max_steps"),
        ("train", {"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs, got -1 with 0"),
        ("train", {"output_dir": "/dev/null/below"}, "output_dir: /dev/null is not a"),
        ("attribute", {"output_dir": "/dev/null"}, "output_dir: /dev/null is not a"),
        ("train", {"train_file": None}, "train_file: give either train_file or dataset"),
        ("train", {"eval_split": "b"}, "eval_split: needs a dataset"),
        ("train", {"load_in_4bit": True, "task": "seq2seq"}, "load_in_4bit: .*got task seq2seq"),
        ("compare", {"methods": ["lora", "bidorra"]}, "'bidora'"),
        ("compare", {"resume_from_checkpoint": "true"}, "resume_from_checkpoint: .*not resume"),
        ("attribute", {"estimator": "unroled"}, "'unroled'.*unrolled"),
        ("attribute", {"estimator": "darts"}, "darts gives no score for each row"),
        ("attribute", {"check": 2}, "check.*at least 5"),
        ("attribute", {"suspects": 1}, "suspects.*at least 2"),
        ("attribute", {"suspects": 3}, "suspects: needs a class label per row; causal-lm has none"),
    ],
)
def test_bad_options_are_one_line_before_any_work(
    command: str, changes: dict[str, Any], words: str, capsys: Capture
) -> None:
    options = {"model": "none", "task": "causal-lm", "train_file": "none.csv", **changes}
    refused(capsys, command, {k: v for k, v in options.items() if v is not None}, words)


@pytest.mark.parametrize(("method", "shown"), [("bidora", "direct"), ("lora", "minres")])
def test_help_has_the_defaults_of_the_method(method: str, shown: str, capsys: Capture) -> None:
    assert main(["train", "--method", method, "--help"]) == 0
    assert f"cg:steps=5,damping=1.0 ({shown})" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_option_of_a_command_once(command: str, capsys: Capture) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"hyperopt-peft {command} " in text and COMMANDS[command] in " ".join(text.split())
    heads = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert len({*heads}) == len(heads) and text.count("\n") < 200
    types = __import__(f"hyperopt_peft.cli.{command}", fromlist=["TYPES"]).TYPES
    own = names_of(types) - names_of([TrainingArguments])
    assert own <= {*heads} and ("learning_rate" in heads) == (
        TrainingArguments in types[-1].__mro__
    )
    assert main([command, "--help_all"]) == 0
    assert {*re.findall(r"--(\w+)", capsys.readouterr().out)} >= names_of(types)
