"""Bilevel steps on the layouts that SFTTrainer reads, against levels of one row at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from hyperopt_peft import BiDoRA, hypergradient
from hyperopt_peft.adapters import use_fast_dora
from hyperopt_peft.problems.bidora import Direction, Magnitude
from tests.support.language import LAYOUTS, language_model, lora, rows
from tests.support.watch import SGD, Watch

trl = pytest.importorskip("trl")

from tests.support.over_trl import made  # noqa: E402

ESTIMATORS = ("direct", "minres:steps=2,damping=1.0,product=difference")


def adapted() -> Any:
    torch.manual_seed(1)
    return get_peft_model(language_model(torch.float64), lora(use_dora=True)).double()


def documents(table: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Each document of prepared rows with its labels; packed rows hold several."""
    for row in table:
        begin = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            part = slice(begin, begin + length)
            yield row["input_ids"][part], row["labels"][part]
            begin += length


def one_at_a_time(model: Any) -> Any:
    """The mean loss over all labels of documents, each of which the model reads alone."""

    def loss(batch: list[tuple[list[int], list[int]]]) -> Tensor:
        sums, count = [], 0
        for ids, labels in batch:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            scored = torch.tensor(labels[1:])
            sums.append(cross_entropy(logits, scored, reduction="sum"))
            count += int((scored != -100).sum())
        return torch.stack(sums).sum() / count

    return loss


def first_step(folder: Path, layout: str, estimator: str) -> tuple[Any, Any]:
    """The first step's directions, on all rows in several micro-batches, and the trainer."""
    watch = Watch()
    data = {"train_dataset": rows(layout, 9), "upper_dataset": rows(layout, 6, seed=1)}
    common = {
        **{**SGD, "max_steps": 1, "lower_steps": 1, "hypergradient": estimator, "retrain": "none"},
        **{"bf16": False, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 20},
    }
    options = {"model": adapted(), "peft_config": None, **data}
    trainer = made(
        folder, trl.SFTTrainer, BiDoRA(), layout, callbacks=[watch], options=options, **common
    )
    trainer.train()
    return watch.gradients[0], trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:minres. the relative residual")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_rows_read_alone(tmp_path: Path, layout: str, estimator: str) -> None:
    """Padding, packing, masks and accumulation change neither direction."""
    directions, trainer = first_step(tmp_path, layout, estimator)
    batches = [list(documents(data)) for data in (trainer.train_dataset, trainer.upper_dataset)]
    if layout == "packed":
        assert max(len(row["seq_lengths"]) for row in trainer.train_dataset) > 1
    model = adapted()
    use_fast_dora(model, "full")
    loss = one_at_a_time(model)
    lower, upper = Direction(model, task_loss=loss), Magnitude(model, task_loss=loss)
    of_upper = hypergradient(
        upper, lower, estimator, upper_batch=batches[1], lower_batch=batches[0]
    )
    of_lower = torch.autograd.grad(loss(batches[0]), lower.variables)
    # A Llama's norms are in float32, which differences divide by their length.
    tolerance = 1e-6 if estimator == "direct" else 1e-2
    for level, expected, near in ((upper, of_upper, tolerance), (lower, of_lower, 1e-6)):
        ours = torch.cat([directions[name].flatten() for name in level.names])
        by_hand = torch.cat([gradient.flatten() for gradient in expected])
        assert (ours - by_hand).norm() < near * by_hand.norm()
