"""Options from YAML and flags are read by the same rules; unknown ones get the nearest name."""

from dataclasses import dataclass

import pytest
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from hyperopt_peft import ProblemError
from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.text.setup import TYPES

REQUIRED = ["--model", "m", "--task", "causal-lm", "--train_file", "t.csv", "--use_cpu"]


@dataclass
class Options:
    rate: float = HfArg(default=1.0, help="-")
    words: list[str] = HfArg(default_factory=lambda: ["a"], help="-")
    active: bool = HfArg(default=True, help="-")
    quiet: bool = HfArg(default=False, help="-")
    name_of_it: str | None = HfArg(default=None, help="-")

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("rate is\nnegative")


def read(*argv):
    (options,) = parse("test", "-", (Options,), argv)
    return options


def yaml(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_yaml_and_flags_give_the_same(tmp_path):
    text = "rate: 1e-3\nwords: [x, y]\nactive: false\nquiet: true\nname-of-it: it\n"
    by_flags = read(
        "--rate", "1e-3", "--words", "x", "y", "--no_active", "--quiet", "--name-of-it=it"
    )
    assert read(yaml(tmp_path, text)) == by_flags == Options(1e-3, ["x", "y"], False, True, "it")


def test_flags_override_the_file(tmp_path):
    file = yaml(tmp_path, "rate: 2\nwords: x\nname_of_it: -3\n")
    assert read(file, "--words", "z", "--rate", "3") == Options(3.0, ["z"], name_of_it="-3")


def test_null_leaves_the_default(tmp_path):
    assert read(yaml(tmp_path, "rate: null\nname_of_it: null")) == Options()


def test_mapping_reaches_training_arguments(tmp_path):
    file = yaml(tmp_path, "lr_scheduler_kwargs: {num_cycles: 2}\nreport_to: none")
    *_, args = parse("test", "-", TYPES, [file, *REQUIRED])
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert isinstance(args, TrainingArguments) and args.report_to == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rat: 2", "unknown option 'rat'; did you mean 'rate'?"),
        ("zzz: 2", "unknown option 'zzz'; --help lists the options"),
        ("help: 2", "unknown option 'help'"),
        ("rate: [1, 2]", "rate takes one value, got the list [1, 2]"),
        ("rate: fast", "argument --rate: invalid float value: 'fast'"),
        ("rate: -1", "rate is\nnegative"),
        ("- rate", "must hold options as `name: value`"),
        ("", "must hold options as `name: value`"),
        ("rate: [", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(ProblemError) as error:
        read(yaml(tmp_path, text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rat", "2"], "unknown option --rat; did you mean '--rate'?"),
        (["--name_of-it=2"], "unknown option --name_of-it; did you mean '--name_of_it'?"),
        (["--wor", "2"], "unknown option --wor"),  # no abbreviations: they change with versions
        (["--rate"], "argument --rate: expected one argument"),
        (["--rate", "2", "c.yaml"], "unexpected argument 'c.yaml'; a YAML file comes before"),
        (["--quiet", "c.yaml"], "unexpected argument 'c.yaml'; a YAML file comes before"),
        (["missing.yaml"], "cannot read missing.yaml (No such file or directory)"),
    ],
)
def test_bad_flags_are_refused(argv, message):
    with pytest.raises(ProblemError) as error:
        read(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (REQUIRED[2:], "the following arguments are required: --model"),
        ([*REQUIRED, "--learning_rat", "1"], "did you mean '--learning_rate'?"),
        ([*REQUIRED, "--hypergradient", "dart"], "unknown estimator 'dart'; did you mean 'darts'?"),
        ([*REQUIRED, "--load_best_model_at_end"], "save and eval strategy to match"),
        ([*REQUIRED, "--method", "bidorra"], "argument --method: invalid choice"),
        ([*REQUIRED, "--rank", "0"], "rank must be at least 1, got 0"),
        ([*REQUIRED, "--dropout", "1"], "dropout must be in [0, 1), got 1"),
        ([*REQUIRED, "--dtype", "float8"], "argument --dtype: invalid choice"),
    ],
)
def test_the_dataclasses_own_checks_are_problem_errors(argv, message):
    with pytest.raises(ProblemError) as error:
        parse("train", "-", TYPES, argv)
    assert message in str(error.value)
