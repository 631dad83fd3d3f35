"""A bilevel trainer over a user's own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from hyperopt_peft import BiDoRA, BilevelTrainer, ProblemError, bilevel
from hyperopt_peft.problems import ClassOffsets
from tests.support.methods import method_trainer
from tests.support.networks import differences
from tests.support.trainers import QUIET, data, peft_model, values

SETTINGS = {**QUIET, "max_steps": 4, "learning_rate": 1e-2}
SETTINGS |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}


class Confident(Trainer):
    """A loss of its own, of each micro-batch: cross entropy and a reward for confidence."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, strength: float = 0.1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.strength = strength

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss - self.strength * outputs.logits.softmax(-1).square().sum(-1).mean()
        return (loss, outputs) if return_outputs else loss


def trained(kind: Any, folder: Path, model: Any, settings: Any = None, **options: Any) -> Any:
    arguments = getattr(kind, "Arguments", TrainingArguments)
    args = arguments(str(folder), **SETTINGS | (settings or {}))
    trainer = kind(model=model, args=args, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


@pytest.mark.skipif(
    not hasattr(Trainer, "loss_is_scaled_for_ga"),
    reason="before Transformers 5.19 the Trainer sums the micro-batches' losses",
)
@pytest.mark.parametrize("scaled", [False, True])
def test_one_level_over_a_loss_of_one_s_own_is_that_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    """Bit for bit, with arguments of its own; the last micro-batches are smaller."""
    monkeypatch.setattr(Confident, "loss_is_scaled_for_ga", scaled)
    table, ends = data(rows=22), []
    for kind in (Confident, bilevel(Confident)):
        model, options = peft_model(dora=False), {"train_dataset": table, "strength": 0.3}
        trainer = trained(kind, tmp_path / kind.__name__, model, **options)
        losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
        ends.append((values(model), losses))
    assert not differences(*ends)


class Optimizing(Confident):
    """With an optimizer of its own where ``rate`` is given, as LLaMA-Factory's."""

    rate: float | None = None

    def create_optimizer(self, *args: Any) -> Any:
        if self.optimizer is None and self.rate is not None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.rate)
        return super().create_optimizer(*args)


def test_an_optimizer_of_the_parent_s_own_holds_the_levels_variables(tmp_path: Path) -> None:
    ends = [
        values(trained(kind, tmp_path, peft_model(dropout=0.0), method=BiDoRA(), **two).model)
        for two in [{"train_dataset": data(), "upper_dataset": data(rows=8, seed=1)}]
        for kind in (bilevel(Confident), bilevel(Optimizing))
    ]
    assert not differences(*ends)
    own = type("Own", (Optimizing,), {"rate": 0.1})
    with pytest.raises(ProblemError, match=r"create_optimizer: .* remove tensors of shape"):
        trained(bilevel(own), tmp_path, peft_model(), train_dataset=data(), method=BiDoRA())


def test_a_parent_that_only_watches_its_loss_is_no_loss_of_its_own(tmp_path: Path) -> None:
    """As TRL's SFTTrainer, which logs numbers in ``compute_loss``."""

    class Watching(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            return super().compute_loss(model, inputs, *args, **options)

    run = method_trainer(tmp_path, method=ClassOffsets(), kind=bilevel(Watching), max_steps=2)
    run.train()
    assert run.state.global_step == 2


def test_a_class_with_both_bases_is_a_class_over_one() -> None:
    class ByHand(BilevelTrainer, Confident):
        pass

    assert ByHand.parent() is bilevel(Confident).parent() is Confident
    assert bilevel(Trainer) is BilevelTrainer
    assert bilevel(Confident).Arguments is BilevelTrainer.Arguments
