"""`WeightedRows`: its loss by hand, in unequal micro-batches, and its dot products."""

from typing import Any

import pytest
import torch
from transformers import default_data_collator

from hyperopt_peft import ProblemError
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.labels import counts_of_labels, label_losses, label_weights
from tests.support.trainers import data, peft_model


def levels(kind: str = "causal") -> tuple[Any, Any, Any, Any]:
    """A model in float64, a level with a weight for each of 6 rows, its logits, and a batch."""
    model = peft_model(kind, dropout=0.0, dora=False).double()
    batch = default_data_collator([dict(row) for row in data(kind, 6, seed=1)])
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    lower = WeightedRows(model, lambda batch: logits[batch["index"]].exp(), tags=["index"])
    if kind == "causal":
        batch["labels"][1, :3] = batch["labels"][2, 3:] = -100
    return model, lower, logits, {**batch, "index": torch.tensor([3, 0, 5, 1, 2, 4])}


@pytest.mark.parametrize("kind", ["causal", "classes"])
@pytest.mark.parametrize("of_labels", [False, True])
def test_the_loss_is_the_weighted_sum_by_the_number_of_labels(kind: str, of_labels: bool) -> None:
    model, lower, logits, batch = levels(kind)
    inputs = {name: value for name, value in batch.items() if name != "index"}
    if of_labels:
        batch["index"] = torch.arange(batch["labels"].numel()).view_as(batch["labels"]) % 6
    losses, scored = label_losses(model, inputs)
    index = batch["index"] if of_labels or kind == "classes" else batch["index"][:, None]
    expected = (logits.exp()[index] * losses).sum() / scored.sum()
    torch.testing.assert_close(lower.loss(batch)["loss"], expected)
    plain = lower.loss(batch)["task_loss"]
    torch.testing.assert_close(plain, model(**inputs).loss, check_dtype=False)


def test_unequal_micro_batches_of_a_trainer_make_the_loss_of_all() -> None:
    _, lower, _, batch = levels()
    parts = [{name: x[chosen] for name, x in batch.items()} for chosen in ([0], [1, 2, 3, 4, 5])]
    entries = label_weights(counts_of_labels(parts, shifted=True) or [])
    each = [lower.loss({**p, **e})["loss"] for p, e in zip(parts, entries, strict=True)]
    torch.testing.assert_close(sum(each) / 2, lower.loss(batch)["loss"])


def test_weights_of_other_rows_are_refused() -> None:
    """A padding-free batch is one row, over which weights of rows must not be broadcast."""
    _, lower, _, batch = levels()
    flat = {name: x.view(1, -1) for name, x in batch.items() if name != "index"}
    with pytest.raises(ProblemError, match=r"\(6,\).*\(1, 36\)"):
        lower.loss({**flat, "index": batch["index"]})
