"""The losses of preference pairs, given by row: weights of pairs, and their scores."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hyperopt_peft import ProblemError, attribute
from hyperopt_peft.problems import GivenWeights, RowWeights
from hyperopt_peft.trainer.tags import without
from tests.support.language import with_logits

over_trl = pytest.importorskip("tests.support.over_trl", exc_type=ImportError)
pytestmark = with_logits
ROWS = 16


def margins(model: Any, batch: Any) -> Tensor:
    ids, scored = batch["input_ids"], batch["completion_mask"][:, 1:]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    logs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    chosen, rejected = (logs * scored).sum(1).chunk(2)
    return chosen - rejected


def pair_losses(model: Any, batch: Any) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference = margins(model, batch)
    return -logsigmoid(0.1 * (margins(model, batch) - reference))


def made(folder: Path, method: Any, **options: Any) -> Any:
    rows = over_trl.data_for(over_trl.DPOTrainer, "preference")
    parts = {"train_dataset": rows.select(range(ROWS))}
    if method is not None:
        parts["upper_dataset"] = rows.select(range(ROWS, len(rows)))
    else:
        parts["eval_dataset"] = rows.select(range(ROWS, len(rows)))
    options = {**parts, **options}
    kind = over_trl.DPOTrainer
    settings = {"bf16": False, "gradient_checkpointing": False, "max_steps": 8}
    return over_trl.made(folder, kind, method, "preference", options=options, **settings)


def test_a_weight_of_each_pair(tmp_path: Path) -> None:
    """At weights of 1 the loss is TRL's; a weight of 0 leaves the pair out."""
    run = made(tmp_path, RowWeights(), row_losses=pair_losses)
    batch = run.data_collator([run.train_dataset[k] for k in range(4)])
    torch.testing.assert_close(run.lower.loss(batch)["loss"], run.task_loss(batch))
    with torch.no_grad():
        run.method.logits[1] = -100.0
    losses = pair_losses(run.model, without(batch, run.tags))
    expected = losses[[0, 2, 3]].sum() / 4
    torch.testing.assert_close(run.lower.loss(batch)["loss"], expected)
    run.method.logits.data.zero_()
    run.train()
    moved = run.method.logits.detach().abs()
    assert moved.shape == (ROWS,) and int(moved.count_nonzero()) >= 4


def test_given_weights_of_1_train_as_trl_does(tmp_path: Path) -> None:
    rows = over_trl.data_for(over_trl.DPOTrainer, "preference").select(range(ROWS))
    weighted = {"train_dataset": rows.add_column("weight", [1.0] * ROWS), "upper_dataset": None}
    run = made(tmp_path / "a", GivenWeights(), row_losses=pair_losses, **weighted)
    alone = made(tmp_path / "b", None)
    for each in (run, alone):
        each.train()
    for (name, a), b in zip(run.model.named_parameters(), alone.model.parameters(), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_another_loss_of_pairs_is_refused(tmp_path: Path) -> None:
    """Here that of another β."""
    doubled = lambda model, batch: 2 * pair_losses(model, batch)  # noqa: E731
    with pytest.raises(ProblemError, match="row_losses: their mean"):
        made(tmp_path, RowWeights(), row_losses=doubled).train()
    with pytest.raises(ProblemError, match=r"DPOTrainer\.compute_loss: .*row_losses"):
        made(tmp_path, RowWeights()).train()


def test_pairs_have_scores(tmp_path: Path) -> None:
    """The derivative by a pair's weight, at the end of TRL's own run."""
    with pytest.raises(ProblemError, match="row_losses"):
        attribute(made(tmp_path, None), progress=False)
    run = made(tmp_path, None)
    scores = attribute(run, row_losses=pair_losses, progress=False).scores
    assert scores.shape == (ROWS,) and bool(scores.isfinite().all())
    alone = made(tmp_path, None)
    alone.train()
    pairs = zip(run.model.named_parameters(), alone.model.parameters(), strict=False)
    for (name, a), b in pairs:
        if "lora" in name and "ref" not in name:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
