"""The study's own variants of BiDoRA."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support import trainers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/study"))

from variants import HyperMagnitudes, Rotating


def test_the_rows_above_are_not_those_of_the_lower_steps_before(tmp_path: Path) -> None:
    rows = trainers.data()
    args = trainers.arguments(tmp_path, max_steps=12, per_device_upper_batch_size=6)
    trainer = Rotating(trainers.peft_model(), args, train_dataset=rows)

    def numbers(batch: dict[str, torch.Tensor]) -> set[int]:
        return {rows["input_ids"].index(row) for row in batch["input_ids"].tolist()}

    below = [numbers(batch) for batch in trainer.get_train_dataloader()]
    above = [numbers(trainer.upper_batches.batch(cycle)) for cycle in range(6)]
    assert len(below) == 12
    for step, batch in enumerate(below):
        assert len(batch) == 4
        assert not batch & above[step // 2]
    assert set().union(*above[:4]) == set(range(24))  # an epoch
    assert len(set().union(*below)) > 18  # more than one cycle can have
    trainer.train()
    assert trainer.state.global_step == 12


def test_hyper_magnitudes_pull_to_a_scale_of_the_first_ones(tmp_path: Path) -> None:
    args = trainers.arguments(tmp_path, hypergradient="minres:steps=5,damping=1.0", retrain="warm")
    trainer = HyperMagnitudes(trainers.peft_model(dropout=0.0), args, train_dataset=trainers.data())
    batch = trainers.data().with_format("torch")[:4]
    with torch.no_grad():
        assert trainer.lower.loss(batch) == trainer.lower.task_loss(batch)
        trainer.scales[0] = torch.tensor(2.0).log()
        trainer.precisions[0] = torch.tensor(3.0).log()
        pull = trainer.lower.loss(batch) - trainer.lower.task_loss(batch)
        assert pull.item() == pytest.approx(1.5 * trainer.start[0].square().mean().item(), rel=1e-4)
        trainer.scales[0] = 0.0
    first = [*trainer.scales.tolist(), *trainer.precisions.tolist()]
    trainer.train()
    learnt = [*trainer.scales.tolist(), *trainer.precisions.tolist()]
    assert all(before != after for before, after in zip(first[1:3], learnt[1:3]))
    assert trainer.retrainer.lower.scales is trainer.scales
    now = [m for n, m in trainers.values(trainer.model).items() if "magnitude" in n]
    assert all(not torch.equal(m, m0) for m, m0 in zip(now, trainer.start, strict=True))
