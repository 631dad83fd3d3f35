"""The ablations: both levels' variables in one level, and those of some methods alone."""

from pathlib import Path
from typing import Any

import pytest

from hyperopt_peft.comparison.ablations import OneLevel
from hyperopt_peft.problems import SEAL, BiDoRA, LoRA, RowWeights, Sources
from tests.support.comparisons import compared
from tests.support.methods import method_trainer
from tests.support.trainers import data


@pytest.mark.parametrize("method", [RowWeights(), Sources(), SEAL()], ids=repr)
def test_it_has_all_rows_once(tmp_path: Path, method: Any) -> None:
    """Also where rows are learned for a second phase, or are in both levels."""
    train, trusted = data(), data(rows=6, seed=1)
    if isinstance(method, Sources):
        train = train.add_column("source", ["a", "b"] * 12)
    options = {"train_dataset": train, "upper_dataset": trusted}
    run = method_trainer(tmp_path, method=OneLevel(method), options=options, max_steps=1)
    assert len(run.train_dataset) == 30 and run.upper is None
    run.train()
    assert method.logits.detach().count_nonzero() > 0


def test_ablations_of_some_methods_alone() -> None:
    methods = {"LoRA": LoRA(), "BiDoRA": BiDoRA(), "published": BiDoRA.published()}
    found = compared(methods, ablations=["BiDoRA"])
    names = ["LoRA", "BiDoRA", "BiDoRA, upper level frozen", "BiDoRA, one level", "published"]
    assert [row[0] for row in found.table()[1:]] == names
    assert sum("is the sum of" in sentence for sentence in found.sentences()) == 1
