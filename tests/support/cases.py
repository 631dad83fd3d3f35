"""Every registered estimator as a case of a test, and counts of calls."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest

from hyperopt_peft import Estimator
from hyperopt_peft.hypergradients import registered
from hyperopt_peft.hypergradients.products import ProductKind

Counted = tuple[Any, str, str]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, *functions: Counted) -> Iterator[Counter[str]]:
    """Count the calls of each (object, name of its function, name of the count)."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return run

    with monkeypatch.context() as patch:
        for thing, attribute, name in functions:
            patch.setattr(thing, attribute, counting(name, getattr(thing, attribute)))
        yield counts


@dataclasses.dataclass(frozen=True)
class Case:
    """A registered estimator with one kind of product."""

    estimator: Estimator
    kind: str
    tolerance: float

    @property
    def rounding(self) -> float:
        """A relative error that is rounding: a difference quotient keeps fewer digits."""
        difference = (
            self.kind == "penalty" or getattr(self.estimator, "product", "") == "difference"
        )
        return 1e-7 if difference else 1e-11


def cases(*kinds: str) -> Any:
    """Parametrises over the registered estimators of ``kinds``, and their kinds of product.

    Dot products, and fastmix with them, are for levels that weight rows: see test_dots.
    """
    found = []
    for name, entry in registered().items():
        if entry.estimator().requirements.observe:
            continue
        options = {field.name for field in dataclasses.fields(entry.estimator)}
        for product in get_args(ProductKind) if "product" in options else (None,):
            estimator = entry.estimator(**({} if product is None else {"product": product}))
            case = Case(estimator, entry.kind, entry.tolerance or 0.0)
            if not kinds or entry.kind in kinds:
                label = name if product is None else f"{name}-{product}"
                found.append(pytest.param(case, id=label))
    return pytest.mark.parametrize("case", found)
