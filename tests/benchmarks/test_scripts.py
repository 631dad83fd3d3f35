"""Every benchmark script runs with its smallest sizes; the pages have the tables of the results."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import pages

ROOT = Path(__file__).parents[2]
SLOW = [
    "speed timing --quick",
    "speed dora_layer --quick",
    "speed language --quick",
    "speed gpu --device cpu --small --threads 1",
    "speed on_paper --quick",
    "estimators comparison --quick --methods direct cg:steps=10",
    "estimators convergence --quick",
    "estimators fidelity --quick",
    "estimators noise --quick",
    "attribution scores --quick --parts methods cost memory suspects",
    "attribution trainers --quick",
    "study run --quick",
]
FAST = ["study report --check", "attribution report --check"]


def script(words: str, *more: str) -> subprocess.CompletedProcess[str]:
    folder, *options = words.split()
    command = [sys.executable, ROOT / "benchmarks" / folder, *options, *more]
    threads = (
        ["--threads", "1"] if folder in ("speed", "estimators") and "--quick" in options else []
    )
    return subprocess.run([*command, *threads], capture_output=True, text=True)


@pytest.mark.parametrize(
    "words", [*FAST, *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)]
)
def test_a_script_runs(words: str) -> None:
    done = script(words)
    assert done.returncode == 0, done.stderr
    assert done.stdout or "--check" in words


def test_a_page_with_another_number_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- a table -->\n\n1\n<!-- end of a table -->")
    pages.write(page, {"a": "1"}, check=True)
    with pytest.raises(SystemExit, match="is not what the results give"):
        pages.write(page, {"a": "2"}, check=True)


def test_every_folder_says_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    page = (ROOT / "benchmarks/README.md").read_text()
    mains = sorted((ROOT / "benchmarks").glob("*/__main__.py"))
    assert mains and all(f"python benchmarks/{path.parent.name}" in page for path in mains)
    for main in [path for path in mains if path.parent.name != "study"]:
        for argument, code in (("--help", 0), ("nothing", 2)):
            monkeypatch.setattr(sys, "argv", [str(main), argument])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(main), run_name="__main__")
            assert end.value.code == code
        listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "  " in line}
        assert listed and listed <= {path.stem for path in main.parent.glob("*.py")}
