"""Which folder may import which: arrows point down only, as the package's layout is drawn."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.documents import PUBLIC, ROOT, sources

LEVELS = {"errors", "utils", "core", "hypergradients"}
ALLOWED = {
    "errors": set(),
    "utils": {"errors"},
    "core": {"errors", "utils"},
    "hypergradients": {"errors", "utils", "core"},
    "engine": LEVELS,
    "betty": LEVELS | {"engine"},
    "diagnostics": LEVELS,
    "adapters": {"errors", "utils"},
    "trainer": LEVELS | {"engine", "adapters"},
    "method": LEVELS | {"engine", "adapters", "trainer"},
    "heads": LEVELS | {"engine", "trainer"},
    "problems": LEVELS | {"engine", "adapters", "trainer", "method", "heads"},
    "attribution": LEVELS | {"engine", "adapters", "trainer", "heads"},
    "comparison": LEVELS | {"engine", "adapters", "trainer", "heads", "problems"},
    "integrations": LEVELS | {"trainer", "comparison"},
    "cli": LEVELS
    | {"engine", "diagnostics", "adapters", "trainer", "heads", "problems", "attribution"}
    | {"comparison", ""},
}
# The floors of the comparison: a file imports files of its own floor and of lower ones.
FLOORS = {
    "run": {"task", "budget", "rows", "influence", "upper", "ablations", "heads", "find"},
    "store": {"store", "identity"},
    "plan": {"choice", "fit"},
    "result": {"result", "sentences", "tables"},
    "compare": {"compare", "work"},
}
# The rooms that may import a library. GPT-2's Conv1D, a layer that PEFT adapts, is transformers's.
LIBRARIES = {
    "transformers": {"trainer", "heads", "problems", "attribution", "comparison", "cli"},
    "transformers.pytorch_utils": {"adapters"},
    "peft": {"adapters", "problems", "comparison", "cli"},
}


def imported(path: Path) -> list[str]:
    """The modules that run when ``path`` is imported; not those for type checkers alone."""
    found = []
    body = list(ast.parse(path.read_text()).body)
    while body:
        node = body.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        body += list(ast.iter_child_nodes(node))
    return found


def modules() -> list[tuple[str, Path]]:
    package = ROOT / "hyperopt_peft"
    inside = [(path.relative_to(package), path) for path in package.rglob("*.py")]
    rooms = [(name.parts[0].removesuffix(".py"), path) for name, path in inside]
    return rooms + [("problems", path) for path in (ROOT / "problems").rglob("*.py")]


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_down(room: str) -> None:
    paths = [path for name, path in modules() if name == room]
    assert paths
    for path in paths:
        for name in imported(path):
            package, _, rest = name.partition(".")
            if package == "hyperopt_peft" and rest:
                below = rest.partition(".")[0]
                at_root = below not in ALLOWED  # a name of the package's own
                assert below == room or ("" if at_root else below) in ALLOWED[room], (path, name)
            elif package in LIBRARIES:
                exact = LIBRARIES.get(name.removesuffix(".Conv1D"), set())
                assert room in LIBRARIES[package] | exact, (path, name)


def test_the_comparison_has_five_floors() -> None:
    floor = {name: n for n, names in enumerate(FLOORS.values()) for name in names}
    folder = ROOT / "hyperopt_peft/comparison"
    paths = {path.stem: path for path in folder.glob("*.py") if path.stem != "__init__"}
    assert paths.keys() == floor.keys()
    for name, path in paths.items():
        for module in imported(path):
            room, _, below = module.removeprefix("hyperopt_peft.").partition(".")
            if room == "comparison" and below:
                assert floor[below.partition(".")[0]] <= floor[name], (name, module)


METHODS = [(str(x.relative_to(ROOT)), x.read_text()) for x in ROOT.glob("problems/**/*.py")]


@pytest.mark.parametrize(("path", "code"), [*METHODS, *sources()])
def test_what_our_methods_and_pages_import_is_public(path: str, code: str) -> None:
    """Contract 21; a method may also import names of a neighbouring method."""
    of_methods = path.startswith("problems/")
    if of_methods:
        assert len(code.splitlines()) <= 150
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            assert all(x.name.partition(".")[0] != "hyperopt_peft" for x in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hyperopt_peft"):
            module = str(node.module).removeprefix("hyperopt_peft").removeprefix(".")
            names = {x.name for x in node.names}
            if re.fullmatch(r"problems\.\w+(\.\w+)?", module):
                neighbours = of_methods or module.startswith("problems.textbook")
                assert neighbours and not any(name.startswith("_") for name in names)
            elif (of_methods, module) != (True, "utils.lazy"):  # the package's own list of names
                modules = {x.rpartition(".")[2] for x in PUBLIC if x.rpartition(".")[0] == module}
                public = import_module(str(node.module)).__all__ if module in PUBLIC else []
                assert names <= {*public, *modules}, (node.module, names)


def test_tests_share_helpers_through_support_alone() -> None:
    """No test module imports another, and every import is absolute."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
        others = [name for name in imported(path) if name.partition(".")[0] == "tests"]
        assert all(name.split(".")[1] in ("support", "matrix") for name in others), (path, others)


def test_parameters_have_types() -> None:
    """Few parameters of public functions are `Any`; `utils.types` has models, batches and rows."""
    found = [
        f"{path.relative_to(ROOT)}:{each.lineno} {each.arg}"
        for _, path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if each.annotation is not None and ast.unparse(each.annotation) == "Any"
    ]
    assert len(found) <= 250, "\n".join(found)


def test_every_module_has_a_room() -> None:
    assert {name for name, _ in modules()} == {*ALLOWED, "__init__", "__main__"}
