"""The study of BiDoRA: its statistics, its plan, and that docs/results.md is what its runs give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import wilcoxon

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "benchmarks/study"
sys.path[:0] = [str(STUDY), str(ROOT / "benchmarks")]

from last_layers import disjoint  # noqa: E402
from measure import mean_and_half  # noqa: E402
from plan import Study  # noqa: E402
from report import compared, differences, of_tasks  # noqa: E402


def command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, STUDY, *options], capture_output=True, text=True)


def test_the_page_is_what_the_runs_give() -> None:
    done = command("report", "--check")
    assert done.returncode == 0, done.stderr


def test_a_page_with_another_number_is_found(tmp_path: Path) -> None:
    done = command("report", "--check", "--results", str(tmp_path))  # no runs
    assert done.returncode == 1
    assert "results.md" in done.stderr


def test_statistics_are_those_of_the_definitions() -> None:
    gaps = [0.03, -0.01, 0.0, 0.02, 0.05, -0.04]
    row = compared(gaps)
    assert row["win/tie/loss"] == "3/1/2"
    # Ranks of the sizes without the tie: 1 2 3 4 5 of which -.01 and -.04 have 1 and 4.
    assert row["effect"] == f"{(2 + 3 + 5 - 1 - 4) / 15:+.2f}"
    assert row["p"] == f"{wilcoxon([gap for gap in gaps if gap]).pvalue:.2g}"
    tied = compared([0.02, -0.02, 0.05, 0.3 - 0.28])  # floats that differ in their last digit
    assert tied["effect"] == f"{(2 - 2 + 4 + 2) / 10:+.2f}"
    assert compared([0.01, -0.01])["effect"] == compared([-0.01, 0.01])["effect"] == "+0.00"
    middle, half = mean_and_half([1.0, 2.0, 3.0])
    assert (middle, half) == (2.0, pytest.approx(4.302653 / 3**0.5))


def test_differences_are_of_the_same_task_and_seed() -> None:
    one = {("a", 0): {"score": 0.5}, ("a", 1): {"score": 0.7}}
    other = {("a", 1): {"score": 0.4}, ("b", 0): {"score": 0.1}}
    assert differences(one, other) == [pytest.approx(0.3)]
    more = one | {("c", 0): {"score": 0.9}, ("c", 1): {"score": 0.3}}
    base = other | {("c", 0): {"score": 0.4}, ("c", 1): {"score": 0.4}}
    assert of_tasks(more, base) == [pytest.approx(0.3), pytest.approx(0.2)]


def test_no_row_is_alike_in_two_parts() -> None:
    texts = ["one two", "three", "one two four", "five", "three", "six", "one two"]
    parts = torch.arange(7).split([3, 2, 2])
    found = disjoint(parts, texts, length=4)  # the class token, two words, the end
    assert [part.tolist() for part in found] == [[0, 1, 2], [3], [5]]


def test_another_study_has_other_result_files(tmp_path: Path) -> None:
    text = (STUDY / "smoke.yaml").read_text()
    paths = set()
    for change in (("a", "a"), ("test: 40", "test: 50"), ("tweets: 16", "tweets: 20")):
        file = tmp_path / "study.yaml"
        file.write_text(text.replace(*change))
        paths |= {run.path(tmp_path) for run in Study.read(file).rates_runs("tweets", 40, "DoRA")}
    assert len(paths) == 6
    file.write_text(text.replace("controls", "control"))
    with pytest.raises(SystemExit, match="is not a study: KeyError"):
        Study.read(file)


def test_a_share_that_does_not_exist_is_refused() -> None:
    for share in ("0/2", "3/2", "x"):
        done = command("run", "--share", share)
        assert done.returncode == 2
        assert "is no share; give 1/2 and 2/2, or 1/1" in done.stderr


def test_a_run_s_file_depends_on_all_of_its_options(tmp_path: Path) -> None:
    study = Study.read(STUDY / "smoke.yaml")
    runs = [*study.variants_runs(), *study.rates_runs("tweets", 40, "DoRA")]
    assert len({run.path(tmp_path) for run in runs}) == len(runs)
    study.default["bilevel"]["lower_steps"] += 1
    changed = [run.path(tmp_path) for run in study.variants_runs()]
    same = [run.path(tmp_path) in changed for run in runs if run.part == "variants"]
    assert same == [True] + 5 * [False]  # the control is not bilevel


def test_a_method_s_rate_is_that_of_the_lowest_held_out_loss(tmp_path: Path) -> None:
    study = Study.read(STUDY / "smoke.yaml")
    cell = ("tweets", 40, "DoRA")
    assert study.chosen(tmp_path, *cell) is None
    for run, loss in zip(study.rates_runs(*cell), (0.9, 0.8), strict=True):
        path = run.path(tmp_path)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'{{"loss": {loss}}}')
    assert study.chosen(tmp_path, *cell) == 5e-3


@pytest.mark.slow
def test_a_small_study_runs() -> None:
    done = command("--smoke")
    assert done.returncode == 0, done.stderr
    assert "BiDoRA, published" in done.stdout
