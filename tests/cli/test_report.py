"""``report.html``: one file with everything, of words that HTML would read as its own too."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from hyperopt_peft.cli.report import Report
from hyperopt_peft.utils.plots import lines
from tests.support.cli import run, small_run


class Structure(HTMLParser):
    """The open elements, and every address."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        assert self.open == []
        assert all(address.startswith("data:image/png;base64,") for address in self.addresses)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        assert tag != "script"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_of_everything(tmp_path: Path) -> None:
    lines({"": {"a": ([0, 1], [0.0, 1.0])}}, tmp_path / "picture.png")
    history = [{"step": k, "loss": 1 / k, "upper_loss": 2 / k} for k in range(1, 9)]
    page = Report(
        "check",
        "a <b> & c is best",
        {"seeds": ["0", "1"], "model": ["$z"]},
        warnings=["few rows"],
        curves={"Both levels": history, "nothing": []},
        pictures={"a picture": tmp_path / "picture.png", "none": tmp_path / "none.png"},
        tables={"Table": [["name", "value"], ["<i>", 0.5]]},
        texts={"Printed": "a < b", "empty": ""},
    )
    text = page.write(tmp_path / "new").read_text()
    assert len(Structure(text).addresses) == 2 and "none" not in text
    for words in ("A &lt;b&gt; &amp; c is best.", "few rows", "&lt;i&gt;", "a &lt; b", "$z"):
        assert words in text
    again = r"<pre>hyperopt-peft check \\\n    --seeds 0 1 \\\n    --model &#x27;\$z"
    assert re.search(again, text)


def test_a_run_leaves_its_page_and_a_card_of_what_was_done(tmp_path: Path) -> None:
    run("train", **small_run(tmp_path, method="lora", max_steps=2))
    page = (tmp_path / "out/report.html").read_text()
    Structure(page)
    assert "evaluation rows, by lora, 2 steps; always the commonest class has" in page
    assert "max_steps" in page and len(re.findall("<img", page)) == 1
    card = (tmp_path / "out/README.md").read_text()
    assert "by LoRA" in card and "hypergradient" not in card and len(card.splitlines()) < 20
