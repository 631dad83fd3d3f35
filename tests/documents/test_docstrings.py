"""Every example of a docstring runs, and every public class and function has one."""

import doctest
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from hyperopt_peft.hypergradients import registered, registry
from tests.support.documents import PUBLIC, ROOT


def modules() -> list[str]:
    paths = [*ROOT.glob("hyperopt_peft/**/*.py"), *ROOT.glob("problems/**/*.py")]
    names = [x.relative_to(ROOT).with_suffix("") for x in paths if ">>> " in x.read_text()]
    inside = ("hyperopt_peft" / name if name.parts[0] == "problems" else name for name in names)
    return sorted(".".join(name.parts).removesuffix(".__init__") for name in inside)


def public() -> dict[str, Any]:
    """The public classes and functions by name; an exception needs no example."""
    found = {}
    for name in PUBLIC:
        module = importlib.import_module(f"hyperopt_peft.{name}".removesuffix("."))
        for each in module.__all__:
            thing = getattr(module, each)
            is_error = isinstance(thing, type) and issubclass(thing, Exception)
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and not is_error:
                found[each] = thing
    return found


@pytest.mark.parametrize("name", modules())
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the names of its module in scope, as doctest has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_ENTRIES", registered())  # an example may register its own
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    failures: list[str] = []
    for example in doctest.DocTestFinder().find(module):
        runner.run(example, out=failures.append)
    assert not failures, "".join(failures)


def test_every_public_name_has_an_example() -> None:
    lacking = {name for name, thing in public().items() if ">>> " not in (thing.__doc__ or "")}
    assert not lacking
