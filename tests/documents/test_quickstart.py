"""The README's first command, made small: one screen, and what it says is in its files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow  # it starts a process and loads the pretrained encoder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("quickstart")
    flags = ["--rows=60", "--test_rows=60", "--passes=45", "--seeds=2", f"--output_dir={folder}"]
    command = [sys.executable, ROOT / "examples/quickstart.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_it_prints_one_screen(output: Any) -> None:
    folder, done = output
    lines = done.stdout.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 160
    assert "{" not in done.stdout and "Warning" not in done.stderr
    results = json.loads((folder / "results.json").read_text())
    for part, count, digits in (("adapters", 3, 4), ("rows that hurt", 4, 3)):
        assert len(results[part]) == count
        for name, accuracy in results[part].items():
            of_name = [x for x in lines if x.strip().startswith(f"{name} ")]
            assert any(f"{accuracy:.{digits}f}" in line for line in of_name)


def test_pictures_and_the_adapter_are_written(output: Any) -> None:
    folder, _ = output
    assert all((folder / f"{name}.png").stat().st_size > 10_000 for name in ("adapters", "rows"))
    assert PeftConfig.from_pretrained(folder / "adapter").peft_type == "LORA"
    assert all(any(path.iterdir()) for path in folder.rglob("*") if path.is_dir())
