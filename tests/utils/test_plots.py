"""The style of figures: files are written or refused, lines are told apart."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from hyperopt_peft import ProblemError
from hyperopt_peft.utils import plots
from hyperopt_peft.utils.plots import COLOURS, drawing


def test_a_figure_is_written_and_the_style_ends_with_it(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    with drawing(tmp_path / "figure.png", 4, 3, 1, 2, sharey=True) as (figure, (left, right)):
        (line,) = left.plot([0, 1], label="line")
        right.plot([1, 0])
        assert not left.legend().get_frame_on()
    assert line.get_color() == COLOURS[0] and tuple(figure.get_size_inches()) == (4, 3)
    assert (tmp_path / "figure.png").stat().st_size > 1_000
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", ["missing/figure.png", "figure.nonsense"])
def test_a_file_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProblemError, match="cannot be written"), drawing(tmp_path / name, 4, 3):
        pass
    with drawing(None, 4, 3) as (figure, _):
        assert figure.get_axes()


def test_a_line_has_one_style_in_each_panel() -> None:
    first = {f"source ${k}": ([0, 1], [0, k]) for k in range(18)}
    second = {name: line for name, line in first.items() if name != "source $3"}
    figure = plots.lines({"one": first, "other": second}, ylabel="share")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(first)
    styles = [[(x.get_color(), x.get_linestyle()) for x in a.lines] for a in figure.axes]
    assert len(set(styles[0])) == 18 and styles[0][:3] + styles[0][4:] == styles[1]


def test_both_levels_of_a_trainers_log_are_drawn_over_its_steps() -> None:
    log = [{"step": k, "loss": k, "upper_loss": 2 * k} for k in (10, 20)]
    (panel,) = plots.level_curves([*log, {"step": 20, "eval_loss": 5}, {"train_loss": 1}]).axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines]
    assert drawn == [([10, 20], [10, 20]), ([10, 20], [20, 40]), ([20], [5])]
    assert panel.get_xlabel() == "lower step"


def test_heavy_tails_are_cut_and_said() -> None:
    scores = np.append(np.linspace(-1, 1, 40), [900.0, np.nan])
    texts = {40: "far", 39: "near", 38: "nearer", 0: "helps"}
    left, right = plots.row_scores(scores, texts, "unchecked").axes
    assert left.get_xlim()[1] < 5 and "1 rows beyond" in left.get_xlabel()
    assert left.get_title().startswith("41 rows")
    assert [bar.get_width() for bar in right.patches] == pytest.approx(scores[[40, 39, 38, 0]])
    assert right.get_xscale() == "symlog" and left.figure.get_supxlabel() == "unchecked"
    plots.row_scores(scores, {}, "no row is shown")
