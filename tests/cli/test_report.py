"""``report.md``: what a run found, and the command that runs it again."""

from __future__ import annotations

import re
from pathlib import Path

from hyperopt_peft.cli.report import Report
from tests.support.cli import run, small_run


def test_a_page_of_everything(tmp_path: Path) -> None:
    history = [{"step": k, "loss": 1 / k, "upper_loss": 2 / k} for k in range(1, 9)]
    page = Report(
        "check",
        "a is best",
        {"seeds": ["0", "1"], "model": ["$z"]},
        curves={"Search": history, "Nothing": []},
        tables={"Table": [["name", "value"], ["a|b", 0.5]]},
        texts={"Printed": "a < b"},
    )
    text = page.write(tmp_path).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"check.md", "search.png"}
    for words in ("**a is best**", "| a\\|b | 0.5 |", "![Search](search.png)", "a < b"):
        assert words in text
    assert "hyperopt-peft check \\\n  --seeds 0 1 \\\n  --model '$z'" in text


def test_a_run_leaves_its_page(tmp_path: Path) -> None:
    run("train", **small_run(tmp_path, method="lora", max_steps=2))
    page = (tmp_path / "out/report.md").read_text()
    assert "evaluation rows, by lora, 2 steps; always the commonest class has" in page
    assert "--max_steps 2" in page and len(re.findall(r"!\[", page)) == 1
