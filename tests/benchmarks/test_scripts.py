"""Every benchmark script runs with its smallest sizes; the pages have the tables of the results."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = [
    "speed timing --quick",
    "speed dora_layer --quick",
    "estimators comparison --quick --methods direct cg:steps=10",
    "estimators convergence --quick",
    "estimators cost --quick",
    "estimators fidelity --quick",
    "estimators noise --quick",
    "attribution scores --quick --parts methods cost memory suspects",
    "attribution trainers --quick",
    "mix cells --quick --parts annotators-lora",
    "study smoke",
]
FAST = ["study report --check", "attribution report", "mix report --check"]


def script(words: str, *more: str) -> subprocess.CompletedProcess[str]:
    folder, *options = words.split()
    command = [sys.executable, ROOT / "benchmarks" / folder, *options, *more]
    threads = ["--threads", "1"] if folder in ("speed", "estimators") and "--quick" in options else []
    return subprocess.run([*command, *threads], capture_output=True, text=True)


@pytest.mark.parametrize(
    "words", [*FAST, *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)]
)
def test_a_script_runs(words: str) -> None:
    done = script(words)
    assert done.returncode == 0, done.stderr
    assert done.stdout or "--check" in words


def test_a_page_with_another_number_is_found(tmp_path: Path) -> None:
    done = script("study report --check", "--results", str(tmp_path / "no.jsonl"))
    assert done.returncode == 1 and "results.md" in done.stderr


def test_every_folder_says_what_it_has() -> None:
    page = (ROOT / "benchmarks/README.md").read_text()
    folders = [path.parent.name for path in (ROOT / "benchmarks").glob("*/__main__.py")]
    assert folders and all(f"python benchmarks/{folder}" in page for folder in folders)
    for folder in set(folders) - {"study"}:
        done = script(f"{folder} --help")
        scripts = {path.stem for path in (ROOT / "benchmarks" / folder).glob("*.py")}
        named = {line.split()[0] for line in done.stdout.splitlines()[2:]}
        assert done.returncode == 0 and named and named <= scripts
        assert script(f"{folder} nothing").returncode == 2
