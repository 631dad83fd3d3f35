"""The README says what is true: its programs run, its table is what its command prints."""

import json
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.estimators import comparison
from tests.support.documents import README, ROOT, blocks

RESULTS = ROOT / "benchmarks/results/comparison.json"


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks(README):
        exec(compile(block, "README.md", "exec"), namespace)
    offsets = namespace["method"].offsets.detach()
    assert offsets[0] - offsets[1] > 1 and offsets[0] - offsets[2] > 1  # log π: 1.8 and 2.5
    assert bool(namespace["scores"].scores.isfinite().all())
    assert namespace["penalty"][:3].max() < namespace["penalty"][3:].mean()


def test_the_estimator_table_is_that_of_the_measurements() -> None:
    (rows,) = json.loads(RESULTS.read_text())["tables"].values()
    assert [r["estimator"] for r in rows if r["kind"] != "peer"] == comparison.METHODS
    assert comparison.short_table(rows) in README and pages.BEGIN.format("estimator") in README
    assert comparison.estimator_table(rows) in (pages.DOCS / "mathematics.md").read_text()
    content = json.loads(RESULTS.read_text())
    assert comparison.page_table(content) in (pages.RESULTS / "comparison.md").read_text()
    # And the measurements are those of this code, where they are the same on every machine.
    measured = comparison.small({method: method for method in comparison.METHODS})
    for row in rows:
        for column, value in measured.get(row["estimator"], {}).items():
            near = isinstance(value, float)  # otherwise no cosine, or a refusal's words
            expected = pytest.approx(value, rel=0.2, abs=1e-6) if near else value
            assert row[column] == expected, row["estimator"]
