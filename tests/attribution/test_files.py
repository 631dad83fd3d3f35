"""`Attribution.to_csv`: the data's columns and the numbers of the rows."""

import csv
from pathlib import Path

import torch

from hyperopt_peft.attribution import Attribution


def test_a_column_of_the_data_is_not_overwritten(tmp_path: Path) -> None:
    scores = torch.tensor([0.5, -1.0, float("nan")], dtype=torch.float64)
    columns = {"text": ["a", "b", "c"], "score": [3, 4, 5]}
    losses = torch.ones(3, dtype=torch.float64)
    result = Attribution(scores, {"all": scores}, losses, {"all": 0.0}, {}, columns)
    result.numbers = [2, 7, 9]
    result.to_csv(tmp_path / "attribution.csv", {"suspect": [0, 1, 0]})
    with (tmp_path / "attribution.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["row"] for line in table] == ["2", "7", "9"]
    assert [line["data_score"] for line in table] == ["3", "4", "5"]
    assert [line["score"] for line in table] == ["0.5", "-1.0", "nan"]
    assert [line["rank"] for line in table] == ["1", "2", "0"]
    assert [line["suspect"] for line in table] == ["0", "1", "0"]
    assert "7  b | 4" in result.table()
