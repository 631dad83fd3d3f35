"""``report.html``: the result of a run, and the command that runs it again."""

import html
from pathlib import Path

from hyperopt_peft.cli.report import Report


def test_a_page_of_everything(tmp_path: Path) -> None:
    history = [{"step": k, "loss": 1 / k, "upper_loss": 2 / k} for k in range(1, 9)]
    page = Report(
        "train",
        "a is best",
        {"seeds": ["0", "1"], "model": ["$z"]},
        curves={"Search": history, "Nothing": []},
        sections={"Table": [["name", "value"], ["a|b", 0.5]], "Printed": "a < b"},
        details={"Numbers": "λ = 3"},
    )
    text = page.write(tmp_path).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "search.png"}
    shown, _, folded = text.partition("<details>")
    for words in ("<b>a is best</b>", "<tr><td>a|b<td>0.5</tr>", 'src="search.png"', "a &lt; b"):
        assert words in shown
    assert "λ = 3" in folded
    again = "hyperopt-peft train \\\n  --seeds 0 1 \\\n  --model '$z'"
    assert html.escape(again) in folded
