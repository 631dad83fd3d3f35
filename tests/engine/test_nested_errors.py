"""What a chain refuses, and which level its errors name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.optim import SGD

from hyperopt_peft import (
    Engine,
    Estimator,
    Nested,
    NonFiniteError,
    Problem,
    ProblemError,
    hypergradient,
)
from hyperopt_peft.engine import minimize
from hyperopt_peft.trainer.checks import check_levels
from tests.support.chains import chain, nested
from tests.support.quadratic import FunctionLevel


def leaf(value: float = 1.0) -> Any:
    return torch.tensor([value], requires_grad=True)


def three(
    f: Any = None, g: Any = None, top: Any = None, non_finite: str = "raise", **options: Any
) -> Engine:
    """An engine over three levels of one number each, with other losses where given."""
    u, v, w = leaf(), leaf(), leaf()
    g, f, top = (
        g or (lambda u, v, w: (v - u + w).square().sum()),
        f or (lambda u, v, w: (w - v).square().sum()),
        top or (lambda u, v, w: (w + v).square().sum()),
    )
    first, middle, lower = (
        FunctionLevel(lambda _, h=h: h(u, v, w), [x], optimizer=SGD([x], lr=0.1), name=name)
        for h, x, name in ((top, u, "first"), (g, v, "middle"), (f, w, "last"))
    )
    level = Nested(middle, lower, **options)
    return Engine(first, level, "cg:product=difference", non_finite=non_finite, progress=False)


@pytest.mark.parametrize("level", ["top", "g", "f"])
def test_a_level_that_is_not_finite_is_named(level: str) -> None:
    name = {"top": "first", "g": "middle", "f": "last"}[level]
    engine = three(**{level: lambda u, v, w: (u + v + w).sum() * float("nan")})
    with pytest.raises(NonFiniteError, match=f"step 1: .*{name}: .*loss"):
        engine.run(1)


def test_steps_that_are_not_finite_can_be_skipped() -> None:
    calls = []

    def now_and_then(u: Any, v: Any, w: Any) -> Any:
        calls.append(1)
        return (w - v).square().sum() * (float("inf") if len(calls) == 5 else 1)

    engine = three(f=now_and_then, non_finite="skip")
    records = engine.run(4)
    assert engine.skipped == 1 and len(records) >= 3
    assert all(torch.isfinite(x) for level in engine.lower.levels for x in level.variables)


@pytest.mark.parametrize(
    ("losses", "name"),
    [
        ({"f": lambda u, v, w: v.sum()}, "last: .*gradient"),
        (
            {
                "g": lambda u, v, w: (w - 1).square().sum(),
                "f": lambda u, v, w: w.square().sum(),
            },
            "middle: .*gradient",
        ),
        (
            {
                "top": lambda u, v, w: w.square().sum(),
                "g": lambda u, v, w: (v - w).square().sum(),
            },
            "first: .*gradient",
        ),
    ],
)
def test_a_variable_that_no_loss_reads_is_named(losses: dict[str, Any], name: str) -> None:
    with pytest.raises(ProblemError, match=name):
        three(**losses).run(1)


def test_a_variable_that_only_the_optimizer_below_reads_is_enough() -> None:
    """One step of the lowest level at the learning rate exp(u), by hand."""
    u, v, w = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-1, 0, 3))

    class Lowest(FunctionLevel):
        def optimizer_options(self) -> dict[str, Any]:
            return {"lr": u.exp()}

    lowest = Lowest(lambda _: (w - 1).square().sum() / 2, [w], optimizer=SGD([w]))
    middle = FunctionLevel(lambda _: (w - 2 + v).square().sum() / 2, [v])
    (part,) = Nested(middle, lowest, "unrolled").gradient(None, (u,)).gradient
    torch.testing.assert_close(part, -u.exp() * (w - 2 + v) * (w - 1))


def test_a_variable_that_only_a_level_below_reads_is_enough() -> None:
    """v is read by f alone, as a penalty is, and u by f alone too."""
    engine = three(
        top=lambda u, v, w: (w + v).square().sum(),
        g=lambda u, v, w: (w - 3).square().sum(),
        f=lambda u, v, w: (w - v - u).square().sum(),
    )
    engine.run(2)
    assert all(x != 1 for x in (*engine.upper.variables, *engine.lower.variables))


class Plain(Problem):
    def loss(self, batch: Any) -> Any:
        return sum(v.sum() for v in self.variables)


def plain(value: Any = None, name: str = "level", **options: Any) -> Plain:
    tensor = leaf() if value is None else value
    return Plain([tensor], optimizer=SGD([tensor], lr=0.1), name=name, **options)


X = leaf()


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Nested(plain(X), plain(X)), "variable 0"),
        (lambda: Nested(plain(), "lower"), "Problem.*str"),
        (lambda: Nested(Nested(plain(), plain()), plain()), "Nested"),
        (lambda: Nested(plain(), Nested(plain(), plain(), "cg"), "cg"), 'product="difference"'),
        (lambda: Nested(plain(), plain(), "cgg"), "'cgg'"),
        (lambda: Nested(plain(), plain(), lower_steps=0), "lower_steps"),
        (lambda: Nested(plain(), plain(), warmup_steps=-1), "warmup_steps"),
        (lambda: Nested(plain(), plain(), follow=0.5), "follow"),
        (lambda: Nested(plain(), plain(), "darts", follow=1), "darts.*follow"),
        (
            lambda: Engine(plain(), Nested(plain(), plain()), "cg"),
            'level: .* cg: .*product="difference"',
        ),
        (
            lambda: hypergradient(plain(), Nested(plain(), plain()), "exact"),
            'level: .* exact: .*product="difference"',
        ),
        (
            lambda: Engine(
                plain(),
                Nested(plain(), plain()),
                "unrolled:steps=2,product=difference",
                lower_steps=2,
            ),
            "level: .*unrolled .*steps=1",
        ),
        (lambda: Engine(Nested(plain(), plain()), plain(), "direct"), "Nested"),
        (lambda: Engine(plain(X), Nested(plain(), plain(X)), "direct"), "variable 0"),
        (
            lambda: Engine(plain(), Nested(plain(), Plain([leaf()], name="last")), "direct"),
            "last: .*optimizer",
        ),
        (lambda: Nested(plain(), plain(), "penalty"), "penalty"),
        (lambda: minimize(Nested(plain(), plain())), "level"),
        (lambda: check_levels([plain(), Nested(plain(), plain())]), "a trainer has two"),
        (lambda: check_levels([Nested(plain(), plain()), plain()]), "a trainer has two"),
    ],
)
def test_mistakes_are_named(construct: Callable[..., Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        construct()


@dataclass(frozen=True)
class Own(Estimator):
    """An estimator of one's own that asks for an exact product."""

    def estimate(self, oracle: Any) -> None:
        with oracle.product("exact"):
            raise AssertionError


def test_an_exact_product_is_refused_whoever_asks() -> None:
    with pytest.raises(ProblemError, match='product="difference"'):
        hypergradient(*nested(chain(3).levels()), Own())
