"""Every notebook is committed with its outputs, and runs; what it claims is asserted in it.

``python -m tests.documents.test_notebooks`` executes all notebooks and writes their outputs.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs/notebooks").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def executed(path: Path, folder: str | Path) -> Any:
    """The notebook after a run in ``folder``."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    options: dict[str, Any] = {"timeout": 880, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": folder}}, **options).execute()
    return notebook


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in code_of(notebook) for output in cell.outputs]


def require_clean(outputs: list[Any]) -> None:
    """No error, no warning and no path of a machine; a picture, and none that is large."""
    assert not any(x.output_type == "error" or x.get("name") == "stderr" for x in outputs)
    texts = [str(x.get("text", x.get("data", {}).get("text/plain", ""))) for x in outputs]
    noise = r"Warning|%\||(?<![\w.])/(?:home|root|tmp|usr|opt|work)/|unchecked"
    assert not re.search(noise, "\n".join(texts))
    pictures = [x.data["image/png"] for x in outputs if "image/png" in x.get("data", {})]
    assert pictures and all(len(picture) < 200_000 for picture in pictures)  # 150 kB in base64


@by_name
def test_a_notebook_is_committed_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    code = code_of(notebook)
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert not any(cell.metadata for cell in notebook.cells)
    assert max(len(cell.source.splitlines()) for cell in code) <= 25
    assert code[0].source.startswith("# %pip install")
    assert sum("assert " in cell.source for cell in code) >= 2
    require_clean(outputs_of(notebook))
    assert "## Next" in notebook.cells[-1].source


@pytest.mark.slow
@by_name
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    require_clean(outputs_of(executed(path, tmp_path)))


def main() -> None:
    """Execute all notebooks, and write their outputs."""
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, folder)
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
