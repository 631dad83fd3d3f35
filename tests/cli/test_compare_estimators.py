"""``check``: the table of estimators at the user's own point, and a recommendation in words."""

import re

import pytest

from hyperopt_peft.cli.compare_estimators import CheckArguments
from hyperopt_peft.cli.main import main
from tests.cli.test_main import failure
from tests.cli.test_train import given
from tests.support.files import flags


def check(capsys, folder, **options):
    assert main(["check", *flags(**given(folder), **options)]) == 0
    return capsys.readouterr().out


def table(text):
    """Cosine and relative error by method."""
    rows = re.findall(r"^(\S+) +(-?[\d.]+) +([\d.e+-]+) +[\d.]+ ", text, re.MULTILINE)
    return {name: (float(cosine), float(error)) for name, cosine, error in rows}


@pytest.mark.parametrize("steps", [0, 2])
def test_every_default_estimator_is_in_the_table(tmp_path, capsys, steps):
    text = check(capsys, tmp_path, steps=steps, reference_steps=20, repeats=1)
    assert list(table(text)) == CheckArguments().chosen()
    assert "against minres:steps=20,damping=1" in text
    assert not (tmp_path / "out").exists()


def test_the_reference_itself_is_recommended_when_it_is_the_only_one(tmp_path, capsys):
    method = "minres:steps=20,damping=10"
    text = check(
        capsys,
        tmp_path,
        methods=["direct", method],
        damping=10,
        reference_steps=20,
        repeats=1,
        min_cosine=0.9999,
    )
    assert table(text)[method] == (1, 0)
    assert f"Use {method}: of 1 within cosine ≥ 0.9999" in text


def test_xi_of_the_learning_rate_is_that_of_the_options(tmp_path, capsys):
    methods = [
        "darts:xi=0.01,scheme=forward",
        "darts:xi=lr,scheme=forward",
        "darts:xi=0.02,scheme=forward",
    ]
    rows = table(check(capsys, tmp_path, methods=methods, reference_steps=5, repeats=1))
    same, by_name, other = (rows[method] for method in methods)
    assert same == by_name != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["drts"]}, "unknown estimator 'drts'; did you mean 'darts'?"),
        ({"reference_steps": 0}, "minres: steps must be at least 1"),
        ({"damping": -1}, "damping must not be negative"),
        ({"steps": -1}, "steps must not be negative, got -1"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"max_relative_error": 0}, "max_relative_error must be positive"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message, capsys):
    given = {"model": "none", "task": "causal-lm", "train_file": "none.csv"}
    assert message in failure(capsys, "check", *flags(**given, **options))
