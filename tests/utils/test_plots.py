"""The style of figures: the colours are distinct, files are written or refused."""

from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from hyperopt_peft import ProblemError
from hyperopt_peft.utils.plots import COLOURS, drawing

# RGB in linear light as seen without red and without green cones: Viénot, Brettel & Mollon 1999.
WITHOUT_RED = [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]
WITHOUT_GREEN = [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]


@pytest.mark.parametrize("vision", [np.eye(3), WITHOUT_RED, WITHOUT_GREEN])
def test_colours_are_distinct_without_colour_vision(vision: list[list[float]]) -> None:
    seen = [np.clip(np.array(vision) @ np.power(to_rgb(colour), 2.2), 0, 1) for colour in COLOURS]
    shown = [np.power(colour, 1 / 2.2) for colour in seen]
    assert min(np.linalg.norm(a - b) for a, b in combinations(shown, 2)) > 0.1


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
