"""Estimators by name: specifications, options and their types, and estimators of the user."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

import pytest

from hyperopt_peft import Engine, Estimator, ProblemError, Solver, hypergradient, register
from hyperopt_peft.hypergradients import (
    DARTS,
    MINRES,
    ConjugateGradient,
    Direct,
    Matvec,
    Neumann,
    Solution,
    Vector,
    get_estimator,
    registered,
    registry,
    zeros_like,
)
from hyperopt_peft.hypergradients.contrib import KFAC, Forward
from hyperopt_peft.utils.validation import matches
from tests.support.quadratic import flat, program


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_ENTRIES", registered())


@pytest.mark.parametrize(
    ("method", "estimator"),
    [
        ("direct", Direct()),
        ("cg", ConjugateGradient()),
        ("cg:", ConjugateGradient()),
        ("cg:steps=40,damping=0.1", ConjugateGradient(steps=40, damping=0.1)),
        (" steps = 3 ".join(["minres:", ""]), MINRES(steps=3)),
        ("cg:tolerance=1e-8", ConjugateGradient(tolerance=1e-8)),
        (
            "cg:product=difference,epsilon=.01",
            ConjugateGradient(product="difference", epsilon=0.01),
        ),
        ("neumann:terms=20,step_size=None", Neumann(terms=20)),
        ("forward:carry=true", Forward(carry=True)),
        ("darts:xi=lr,scheme=forward", DARTS(xi="lr", scheme="forward")),
        ("darts:xi='lr'", DARTS(xi="lr")),
        ("kfac:steps=0,damping=none", KFAC(steps=0)),
        (MINRES(steps=2), MINRES(steps=2)),
    ],
)
def test_specifications_name_an_estimator_with_options(method: Any, estimator: Estimator) -> None:
    actual = get_estimator(method)
    assert actual == estimator and type(actual) is type(estimator)


@pytest.mark.parametrize("name", registered())
def test_an_estimator_knows_its_name_and_its_repr_builds_it_again(name: str) -> None:
    estimator = get_estimator(name)
    assert estimator.name == name
    names = {entry.estimator.__name__: entry.estimator for entry in registered().values()}
    assert eval(repr(estimator), names) == estimator


MISTAKES = {
    "cgg": "'cgg'.*'cg'",
    "neuman:terms=3": "'neuman'.*'neumann'",
    "xyzzy": "'xyzzy'.*cg, darts, direct",
    "cg:step=4": "cg: .*'step'.*'steps'",
    "cg:40": "cg: .*'40'",
    "cg:steps=0": "cg: steps .* 0",
    "cg:steps=2.5": "cg: steps .*2.5",
    "cg:steps=True": "cg: steps .*True",
    "cg:damping=high": "cg: damping .*'high'",
    "cg:product=finite": "cg: product .*'exact' or 'difference'.*'finite'",
    "minres:tolerance=1": "minres: tolerance .* 1",
    "warm:decay=1.5": "warm: decay .*1.5",
    "darts:xi=rl": "darts: xi .*'lr'.*'rl'",
    "darts:scheme=3": "darts: scheme .*'central'.*'forward'",
    "sama:epsilon=0": "sama: epsilon ",
    "f2sa:tolerance=1": "f2sa: tolerance .* 1",
    "forward:carry=1": "forward: carry .* 1",
}


@pytest.mark.parametrize("estimator", MISTAKES)
def test_mistakes_are_named(estimator: str) -> None:
    with pytest.raises(ProblemError, match=MISTAKES[estimator]):
        get_estimator(estimator)


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: DARTS(epsilon=0.0), "darts: epsilon "),
        (lambda: DARTS(xi=float("nan")), "darts: xi "),
        (lambda: register("cg", kind="direct")(Direct), "cg: .*registered"),
        (lambda: register("new", kind="best")(Direct), "new: kind .*'implicit'.*'best'"),
        (lambda: register("new", kind="implicit")(Direct), "new: .*tolerance"),
        (lambda: register("new", kind="penalty")(Direct), "new: .*tolerance"),
    ],
)
def test_mistakes_in_a_class_are_named(construct: Callable[[], object], message: str) -> None:
    before = registered()
    with pytest.raises(ProblemError, match=message):
        construct()
    assert registered() == before


@pytest.mark.parametrize("name", registered())
def test_no_option_takes_a_negative_number(name: str) -> None:
    hints = get_type_hints(registered()[name].estimator)
    fields = {field.name for field in dataclasses.fields(get_estimator(name))}
    for option in sorted(option for option in fields if matches(-1, hints[option])):
        with pytest.raises(ProblemError, match=f"{name}: {option} "):
            get_estimator(f"{name}:{option}=-1")


def test_a_solver_of_the_user_is_a_few_lines() -> None:
    @register("richardson", kind="implicit", tolerance=1e-3)
    @dataclass(frozen=True)
    class Richardson(Solver):
        steps: int = 200
        rate: float = 0.1

        def solve(self, matvec: Matvec, b: Vector) -> Solution:
            v = zeros_like(b)
            for _ in range(self.steps):
                v = v + self.rate * (b - matvec(v))
            return Solution(v, steps=self.steps)

    quadratic = program(0)
    levels = quadratic.levels()
    exact = flat(hypergradient(*levels, "exact"))
    for method in ("richardson", "richardson:steps=300,product=difference", Richardson()):
        error = flat(hypergradient(*levels, method)) - exact
        assert error.norm() < 1e-3 * exact.norm()
    assert Engine(*levels, "richardson:steps=20", progress=False).run(1)[0]["solver_steps"] == 20
    with pytest.raises(ProblemError, match=r"richardson: .*'rates'.*'rate'"):
        get_estimator("richardson:rates=1")
