"""The pages, and the Python code of pages, notebooks and examples."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}

#: The modules of the package whose ``__all__`` is public; "" is the root.
PUBLIC = {"", "adapters", "attribution", "comparison", "core", "diagnostics", "engine", "heads"}
PUBLIC |= {"hypergradients", "method", "problems", "utils.plots"}


def blocks(text: str, language: str = "python") -> list[str]:
    """The blocks of a page in ``language``."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def sources() -> Iterator[tuple[str, str]]:
    """The Python code of each page, notebook and example, by its path in the repository."""
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.*"), *ROOT.glob("examples/**/*.py")]:
        name = str(path.relative_to(ROOT))
        if path.suffix == ".md":
            yield name, "\n".join(blocks(path.read_text()))
        elif path.suffix == ".ipynb":
            cells = [x for x in json.loads(path.read_text())["cells"] if x["cell_type"] == "code"]
            code = "\n".join("".join(cell["source"]) for cell in cells)
            yield name, re.sub("^%.*$", "", code, flags=re.M)
        elif path.suffix == ".py" and "upstream" not in path.parts:
            yield name, path.read_text()
