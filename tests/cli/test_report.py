"""``report.md``: what a run found, and the command that runs it again."""

from __future__ import annotations

from pathlib import Path

from hyperopt_peft.cli.report import Report


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
