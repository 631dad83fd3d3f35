"""A bilevel trainer over a user's own Trainer."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from hyperopt_peft import BiDoRA, BilevelTrainer, ProblemError, bilevel
from hyperopt_peft.method import row_losses
from hyperopt_peft.problems import RowWeights
from tests.support.class_weights import Stream
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


@dataclass
class OwnArguments(TrainingArguments):
    """As axolotl's: fields of its own, with defaults."""

    sparsity: float = 0.0


class Stepping(Trainer):
    """As axolotl's: the class of its arguments stands in its body, and its step calls super's."""

    args: OwnArguments

    def __init__(self, *args: Any, **options: Any) -> None:
        self.seen: list[set[str]] = []
        super().__init__(*args, **options)

    def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        self.seen.append({*inputs})
        return super().training_step(model, inputs, *args, **options)


class Sparse(Confident):
    """Its step drops the small entries of a gradient, before the Trainer clips it."""

    def training_step(self, model: Any, *args: Any, **options: Any) -> Any:
        loss = super().training_step(model, *args, **options)
        for parameter in filter(lambda p: p.grad is not None, model.parameters()):
            parameter.grad *= parameter.grad.abs() > parameter.grad.abs().mean()
        return loss


@pytest.mark.skipif(
    not hasattr(Trainer, "loss_is_scaled_for_ga"),
    reason="before Transformers 5.19 the Trainer sums the micro-batches' losses",
)
@pytest.mark.parametrize("parent", [Confident, Sparse])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rows", [data(rows=22), Stream(0, data(rows=22))], ids=["rows", "stream"])
def test_one_level_over_a_loss_or_a_step_of_one_s_own_is_that_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Any, scaled: bool, parent: Any
) -> None:
    """Bit for bit, with arguments of its own; the last micro-batches are smaller."""
    monkeypatch.setattr(Confident, "loss_is_scaled_for_ga", scaled)
    ends = []
    for kind in (parent, bilevel(parent)):
        model, options = peft_model(dora=False), {"train_dataset": rows, "strength": 0.3}
        trainer = trained(kind, tmp_path / kind.__name__, model, **options)
        losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
        ends.append((values(model), losses))
    assert not differences(*ends)


def test_a_trainer_of_axolotl_s_shape_trains_bidora(tmp_path: Path) -> None:
    """Bit for bit as without it: its step only calls super's; its arguments object is given."""
    kind, ends = bilevel(Stepping), []
    assert issubclass(kind.Arguments, OwnArguments)
    for made in (kind, BilevelTrainer):
        arguments = OwnArguments if made is kind else BilevelTrainer.Arguments
        more = {"sparsity": 0.5} if made is kind else {}
        args = arguments(str(tmp_path / made.__name__), **SETTINGS, **more)
        model = peft_model()
        trainer = made(model, args, method=BiDoRA(), train_dataset=data())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logs = [
            {name: x for name, x in record.items() if "second" not in name and "time" not in name}
            for each in (trainer, trainer.retrainer)
            for record in each.state.log_history
        ]
        ends.append({"values": values(model), "logs": logs})
        if made is kind:
            assert trainer.args.sparsity == 0.5 == trainer.args.resume_must_match()["sparsity"]
            assert (trainer.args.lower_steps, trainer.args.hypergradient) == (4, "direct")
            assert "sparsity" not in trainer.args.bilevel_settings()
            phases = trainer, trainer.retrainer  # 19 rows, then 24, in epochs of 2 steps
            assert [len(phase.seen) for phase in phases] == [2 * 5, 2 * 6]
            columns = {"input_ids", "attention_mask", "labels"}
            assert all(seen == columns for phase in phases for seen in phase.seen)
    assert not differences(*ends)
    assert any("upper_loss" in record for record in ends[0]["logs"])


def test_arguments_of_a_parent_get_those_of_the_upper_level(tmp_path: Path) -> None:
    """Whatever the class hint is; the values of the given object stay as they are."""
    theirs = OwnArguments(str(tmp_path), sparsity=0.25, logging_steps=7, report_to="none")
    before = dict(vars(theirs))
    for kind in (BilevelTrainer.Arguments, bilevel(Stepping).Arguments):
        args = kind.of(theirs, lower_steps=3, retrain_arguments={"max_steps": 2})
        before |= {"dataloader_pin_memory": args.dataloader_pin_memory}
        assert vars(args) == vars(args) | before
        assert args.lower_steps == 3 and args.for_retraining().max_steps == 2
        assert isinstance(args, OwnArguments) and isinstance(args, BilevelTrainer.Arguments)
        assert pickle.loads(pickle.dumps(args)).sparsity == 0.25
    for settings, message in (
        ({"lower_step": 3}, "lower_step: .*'lower_steps'"),
        ({"learning_rate": 1.0}, "learning_rate: "),
        ({"lower_steps": 0}, "lower_steps must be"),
    ):
        with pytest.raises(ProblemError, match=message):
            BilevelTrainer.Arguments.of(theirs, **settings)


def test_a_step_around_the_passes_is_part_of_the_search(tmp_path: Path) -> None:
    """What it leaves of the gradients is what the lower level moves by, and no upper one."""

    class Frozen(Stepping):
        def training_step(self, model: Any, *args: Any, **options: Any) -> Any:
            loss = super().training_step(model, *args, **options)
            for name, parameter in model.named_parameters():
                if "query" in name and parameter.grad is not None:
                    parameter.grad.zero_()
            return loss

    model = peft_model()
    start, args = values(model), OwnArguments(str(tmp_path), **SETTINGS | {"max_steps": 8})
    trainer = bilevel(Frozen)(model, args, method=BiDoRA(), train_dataset=data())
    trainer.train()
    for name, value in values(model).items():
        moved = "query" not in name or "magnitude" in name
        assert torch.equal(value, start[name]) != moved, name


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


def test_a_parent_that_only_watches_its_loss_says_so(tmp_path: Path) -> None:
    """By the rule for the mean over labels, which no value shows."""

    class Watching(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            return super().compute_loss(model, inputs, *args, **options)

    rows = {"train_dataset": data(rows=16), "upper_dataset": data(rows=8, seed=1)}
    settings = {"method": RowWeights(), "kind": bilevel(Watching), "max_steps": 2}
    with pytest.raises(ProblemError, match=r"BilevelWatching\.compute_loss"):
        method_trainer(tmp_path, options=rows, **settings)
    run = method_trainer(tmp_path, options={**rows, "row_losses": row_losses}, **settings)
    run.train()
    assert run.state.global_step == 2


def test_a_class_with_both_bases_is_a_class_over_one() -> None:
    class ByHand(BilevelTrainer, Confident):
        pass

    assert ByHand.parent() is bilevel(Confident).parent() is Confident
    assert bilevel(Trainer) is BilevelTrainer
    assert bilevel(Confident).Arguments is BilevelTrainer.Arguments


class Preparing(Trainer):
    """As ms-swift's: what the Trainer calls on each batch only calls super's."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(inputs)


class Flipping(Preparing):
    """It gives the batch other labels."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "labels": (inputs["labels"] + 1) % 3}


class Drawing(Preparing):
    """It adds noise, from the global generator, to an entry of the batch: which tokens are seen."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        shown = torch.rand(inputs["attention_mask"].shape) < 0.9
        shown[:, 0] = True
        return {**inputs, "attention_mask": inputs["attention_mask"] * shown}


def flipped(table: Any) -> Any:
    return table.map(lambda row: {"labels": (row["labels"] + 1) % 3})


@pytest.mark.parametrize("parent", [Preparing, Flipping])
def test_what_prepares_a_batch_has_its_effect_on_both_levels(tmp_path: Path, parent: Any) -> None:
    """Bit for bit as if the data were so."""
    ends, as_it_is = [], lambda table: table
    in_data = flipped if parent is Flipping else as_it_is
    for kind, do in ((bilevel(parent), as_it_is), (BilevelTrainer, in_data)):
        levels = {"train_dataset": do(data(rows=22)), "upper_dataset": do(data(rows=8, seed=1))}
        model = peft_model()
        trainer = trained(kind, tmp_path, model, {"lower_steps": 1}, method=BiDoRA(), **levels)
        losses = [x["upper_loss"] for x in trainer.state.log_history if "upper_loss" in x]
        assert len(losses) == 4
        ends.append((values(model), losses))
    assert not differences(*ends)


def test_one_level_over_a_trainer_that_draws_in_preparing_is_that_trainer(tmp_path: Path) -> None:
    ends = []
    for kind in (Drawing, bilevel(Drawing)):
        model = peft_model(dora=False)
        trained(kind, tmp_path, model, {"gradient_accumulation_steps": 1}, train_dataset=data())
        ends.append(values(model))
    assert not differences(*ends)


def test_a_row_s_number_stays_beside_the_row_that_is_prepared(tmp_path: Path) -> None:
    """Labels of rows may change; another entry may not, since its rows may have moved."""

    class Turning(Preparing):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return {name: x.flip(0) for name, x in super()._prepare_inputs(inputs).items()}

    levels = {"train_dataset": data(rows=22), "upper_dataset": data(rows=8, seed=1)}
    for parent in (Preparing, Flipping):
        trained(bilevel(parent), tmp_path, peft_model(dora=False), method=RowWeights(), **levels)
    with pytest.raises(ProblemError, match="Turning: _prepare_inputs changes "):
        trained(bilevel(Turning), tmp_path, peft_model(dora=False), method=RowWeights(), **levels)


def test_what_prepares_a_batch_without_super_is_refused() -> None:
    """In the class given to `bilevel`, and in one derived from a bilevel trainer."""

    class Generating(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return inputs

    with pytest.raises(ProblemError, match="Generating: overrides _prepare_inputs without"):
        bilevel(Generating)
    body = {"_prepare_input": lambda self, data: data}
    with pytest.raises(ProblemError, match="Own: overrides _prepare_input without"):
        type("Own", (BilevelTrainer,), body)
