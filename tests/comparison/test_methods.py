"""Methods in a comparison: each with an upper level, within its budget, and its ablations."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperopt_peft.comparison import METHODS, find_method
from hyperopt_peft.comparison.ablations import OneLevel
from hyperopt_peft.core.labels import row_losses
from hyperopt_peft.heads import Head
from hyperopt_peft.problems import (
    SEAL,
    BiDoRA,
    LayerDecay,
    LayerScales,
    LoRA,
    RowWeights,
    Sources,
    WeightNet,
)
from hyperopt_peft.trainer.method import has_upper_level
from tests.support.comparisons import TITLES, compared, passes_of
from tests.support.methods import method_trainer
from tests.support.trainers import data

#: One whose second phase is from scratch, one without any, and one that reads its rows.
QUICK = ("autolora", "bilora", "sources")
NAMES = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in METHODS
    if has_upper_level(find_method(name)())
]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_compared(name: str) -> None:
    """Within its budget, beside both ablations."""
    uneven = [row for row in range(39) if row % 3 < 2 or row < 12]  # 13, 13 and 4 of the classes
    train, trusted = data(rows=39).select(uneven), data(rows=8, seed=9)
    if name == "sources":
        train = train.add_column("source", ["a", "b"] * 15)
    options: dict[str, Any] = {"train_dataset": train, "passes": 50}
    if name in ("row_weights", "seal", "weight_net", "sources"):
        options["upper_dataset"] = trusted
    method = find_method(name)()
    comparison = compared({"LoRA": LoRA(), name: method}, **options)
    together = method.one_level and method.defaults.get("retrain") != "scratch"
    assert len(comparison.plan.candidates()) == 3 + together
    for (
        result
    ) in comparison.store.results.values():  # to one step, which is an upper one in the last search
        last = 1 if len(result["steps"]) > 1 or result["kind"] == "one level" else 6
        assert 50 - last < passes_of(result) <= 50
    assert any("absorbs" in each for each in comparison.sentences()) == method.absorbed


@pytest.mark.parametrize("method", [RowWeights(), Sources(), SEAL()], ids=repr)
def test_one_level_has_all_rows_once(tmp_path: Path, method: Any) -> None:
    """Also where rows are learned for a second phase, or are in both levels."""
    train, trusted = data(), data(rows=6, seed=1)
    if isinstance(method, Sources):
        train = train.add_column("source", ["a", "b"] * 12)
    options = {"train_dataset": train, "upper_dataset": trusted}
    run = method_trainer(tmp_path, method=OneLevel(method), options=options, max_steps=1)
    assert len(run.train_dataset) == 30 and run.upper is None
    run.train()
    assert method.logits.detach().count_nonzero() > 0


@pytest.mark.parametrize(
    "method", [RowWeights(), RowWeights(form="softmax"), WeightNet(), Sources()]
)
def test_the_lower_loss_alone_takes_weights_to_an_end(method: Any) -> None:
    """At fixed parameters: to 0, to one row or to one source; so there is no form in one level."""
    torch.manual_seed(0)
    rows = {"features": torch.randn(6, 3), "labels": torch.arange(6) % 2}
    tags = {"index": torch.arange(6), "source": torch.arange(6) % 3}
    head, method.count = Head(3, 2), 6
    head.weight.data.normal_()
    method.names, method.counts, method.trusted = ["a", "b", "c"], torch.full((3,), 2), 2
    upper, lower = method.levels(head, optimizers=[partial(torch.optim.Adam, lr=0.3)] * 2)
    least = row_losses(head, rows)[0].unflatten(0, (2, 3)).mean(0).min()
    for _ in range(300):
        loss = lower.loss(rows | {name: tags[name] for name in method.tags})["loss"]
        loss.backward()
        upper.optimizer.step()
        upper.optimizer.zero_grad()
    assert not method.one_level and loss < 1.02 * least


def test_a_decay_that_is_learned_or_avoided_has_no_form_in_one_level() -> None:
    """A scale that grows while its factors shrink leaves a layer's update as it is."""
    assert not LayerDecay().one_level and not LayerScales(decay=0.1).one_level
    assert LayerScales().one_level and BiDoRA().one_level


def test_ablations_of_some_methods_alone() -> None:
    methods = {"LoRA": LoRA(), "BiDoRA": BiDoRA(), "published": BiDoRA.published()}
    found = compared(methods, ablations={"BiDoRA": ["frozen", "one level"]})
    assert [*found.scores()] == [*TITLES, "published"]
    assert sum("is the sum of" in sentence for sentence in found.sentences()) == 1
