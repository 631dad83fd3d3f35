"""`BilevelTrainer` with a `Method`: phases, rows, defaults, and a plain adapter at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import HfArgumentParser, TrainerCallback

from hyperopt_peft import (
    BiDoRA,
    BilevelTrainer,
    BilevelTrainingArguments,
    Engine,
    Method,
)
from hyperopt_peft.adapters import split_parameters
from hyperopt_peft.problems import ClassOffsets, LayerScales, LoRA, Sources
from tests.support.methods import ARGUMENTS, method_trainer
from tests.support.trainers import TASKS, base_model, data, peft_model, trainer, values


def test_a_baseline_is_one_level_on_all_rows(tmp_path: Path) -> None:
    more = {"upper_dataset": data(rows=6, seed=1)}
    run = method_trainer(tmp_path, method=LoRA(), options=more)
    assert run.upper is None and len(run.train_dataset) == 30
    run.train()
    args = BilevelTrainingArguments(str(tmp_path), **ARGUMENTS)
    one = BilevelTrainer(peft_model(dora=False), args, train_dataset=run.train_dataset)
    one.train()
    assert run.retrainer is None
    assert all(torch.equal(x, values(one.model)[name]) for name, x in values(run.model).items())


def test_the_user_s_arguments_come_before_the_method_s(tmp_path: Path) -> None:
    args = BilevelTrainingArguments(str(tmp_path), lower_steps=1, use_cpu=True, report_to="none")
    run = BilevelTrainer(peft_model(), args, method=BiDoRA(), train_dataset=data())
    assert (run.args.hypergradient, run.args.lower_steps) == ("direct", 1)
    assert args.hypergradient != "direct"


def test_arguments_that_are_copied_or_parsed_keep_what_is_not_given(tmp_path: Path) -> None:
    """`replace` and a parser pass every field, and so every argument of the constructor."""
    words = ["--output_dir", str(tmp_path), "--retrain", "warm", "--report_to", "none"]
    (parsed,) = HfArgumentParser(BilevelTrainingArguments).parse_args_into_dataclasses(words)
    args = BilevelTrainingArguments(str(tmp_path), retrain="warm", report_to="none")
    for each in (parsed, replace(args, max_steps=5)):
        found = each.with_defaults({"hypergradient": "direct", "upper_learning_rate": 0.1})
        assert (found.hypergradient, found.upper_learning_rate) == ("direct", 0.1)
        assert (found.retrain, found.lower_steps) == ("warm", 1)


def test_a_copy_of_a_published_method_is_published() -> None:
    copied = [
        replace(BiDoRA.published(), gamma=0.1),
        replace(ClassOffsets.published(), factor=False),
        replace(Sources.published("fastmix"), column="group"),
    ]
    found = [
        (x.defaults["hypergradient"].partition(":")[0], x.defaults["lower_steps"]) for x in copied
    ]
    assert found == [("darts", 4), ("neumann", 20), ("fastmix", 20)]
    assert copied[1].defaults["retrain"] == "scratch"
    assert BiDoRA.published() != BiDoRA()


def test_the_second_phase_has_the_class_and_its_loss(tmp_path: Path) -> None:
    """Also of a class with a constructor of its own, and with what it keeps for the loss."""
    factors = []

    class Scaled(BilevelTrainer):
        def __init__(self, model: Any, args: Any, factor: float, **options: Any) -> None:
            self.half = factor / 2
            super().__init__(model, args, **options)
            self.factor = factor

        def get_decay_parameter_names(self, model: Any) -> Any:
            assert self.half == 0.25  # the constructor asks for them
            return super().get_decay_parameter_names(model)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            factors.append((self.upper is None, self.factor))
            return super().compute_loss(*args, **kwargs) * self.factor

    run = method_trainer(tmp_path, method=LayerScales(), kind=Scaled, options={"factor": 0.5})
    run.train()
    assert (
        type(run.retrainer) is Scaled
        and run.retrainer is not run
        and set(factors) == {(False, 0.5), (True, 0.5)}
    )
    assert run.state.global_step == run.retrainer.state.global_step == 6
    assert run.retrainer.args.output_dir == f"{tmp_path}/retrain"
    assert (len(run.train_dataset), len(run.retrainer.train_dataset)) == (19, 24)


def test_after_each_upper_step_the_method_projects(tmp_path: Path) -> None:
    class Limited(LayerScales):
        def prepare(self, model: Any) -> None:
            super().prepare(model)
            self.logs = self.upper_variables(model).values()

        def after_upper_step(self) -> None:
            for log in self.logs:
                log.clamp_(-0.01, 0.01)

    free, limited = LayerScales(), Limited()
    for method in (free, limited):
        method_trainer(tmp_path, method=method, retrain="none").train()
    assert max(free.scales.values()) > 1.05
    assert max(limited.scales.values()) == pytest.approx(1.01, abs=1e-4)


def test_engine_s_levels_project_too() -> None:
    class Clipped(Method):
        def prepare(self, model: Any) -> None:
            self.u, self.calls = torch.ones(1, requires_grad=True), 0

        def upper_variables(self, model: Any) -> dict[str, Tensor]:
            return {"u": self.u}

        def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Tensor:
            return (model.weight - self.u).square().sum()

        def after_upper_step(self) -> None:
            self.u.clamp_(min=0.5)

    model, method = torch.nn.Linear(1, 1, bias=False), Clipped()
    optimizers = [lambda variables: torch.optim.SGD(variables, lr=0.3)] * 2
    levels = method.levels(model, lambda _: model.weight.square().sum(), optimizers=optimizers)
    Engine(*levels, "cg", lower_steps=20, progress=False).run(20)
    assert method.u.item() == 0.5 and model.weight.item() == pytest.approx(0.5, abs=1e-3)


SLOW = [pytest.param(k, "bidora", marks=pytest.mark.slow) for k in TASKS if k != "classes"]


@pytest.mark.parametrize(("kind", "method"), [("classes", "bidora"), ("causal", "lora"), *SLOW])
def test_every_task_and_method(tmp_path: Path, kind: Any, method: Any) -> None:
    """The loss on the training data falls, and stock PEFT loads what was saved."""
    run = trainer(
        tmp_path, kind, dropout=0.0, method=method, max_steps=30, learning_rate=3e-2, retrain="none"
    )
    before = run.evaluate(run.train_dataset)["eval_loss"]
    run.train()
    assert run.evaluate(run.train_dataset)["eval_loss"] < 0.95 * before
    run.save_model()
    assert "hyperopt" not in (tmp_path / "adapter_config.json").read_text()
    again = PeftModel.from_pretrained(base_model(kind, 0.0), tmp_path).eval()
    batch = run.data_collator([data(kind)[i] for i in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(
            again(**batch).logits, run.model.eval()(**batch).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("retrain", ["warm", "scratch"])
def test_retraining_moves_directions_on_all_data_with_magnitudes_as_the_search_left_them(
    tmp_path: Path, retrain: Any
) -> None:
    model = peft_model()
    start = values(model)
    options = {"retrain": retrain, "retrain_arguments": {"max_steps": 1, "learning_rate": 0.0}}
    run = trainer(tmp_path, model=model, **options)
    run.train()
    parts = split_parameters(model)
    searched = values(model)
    returned = {n for n in (*parts.directions, *parts.rest) if torch.equal(start[n], searched[n])}
    assert returned == ({*parts.directions, *parts.rest} if retrain == "scratch" else set())

    model = peft_model()
    run = trainer(tmp_path, model=model, retrain=retrain, retrain_arguments={"max_steps": 5})
    run.train()
    parts, end = split_parameters(model), values(model)
    assert all(torch.equal(end[n], searched[n]) for n in parts.magnitudes)
    assert not any(torch.equal(end[n], searched[n]) for n in parts.directions)
    assert len(run.train_dataset) < len(run.retrainer.train_dataset) == 24
    assert run.state.global_step == 6
    assert run.retrainer.state.global_step == 5


def test_retraining_has_its_own_length_rate_and_decay(tmp_path: Path) -> None:
    own = {"num_train_epochs": 2, "learning_rate": 5e-4, "weight_decay": 0.3}
    run = trainer(tmp_path, retrain="warm", retrain_arguments=own)
    run.train()
    assert run.retrainer.state.global_step == 2 * 6  # 24 examples in batches of 4
    assert run.retrainer.state.log_history[0]["learning_rate"] == 5e-4
    assert run.retrainer.optimizer.param_groups[0]["weight_decay"] == 0.3
    assert (run.args.learning_rate, run.args.weight_decay) == (1e-2, 0.0)


@pytest.mark.parametrize(
    ("rate", "steps", "again", "short"),
    [
        (1e-3, 99, 100, ["search: 99 steps"]),
        (2e-3, 50, 49, ["retraining: 49 steps"]),
        (0.0, 7, 7, []),  # a control
    ],
)
def test_a_phase_too_short_to_learn_is_named_with_the_steps_it_needs(
    tmp_path: Path, caplog: Any, rate: float, steps: int, again: int, short: list[str]
) -> None:
    sizes = {"max_steps": steps, "retrain_arguments": {"max_steps": again}, "retrain": "warm"}
    run = trainer(tmp_path, learning_rate=rate, **sizes)
    run.create_optimizer = lambda *_: 1 / 0  # before any work
    with pytest.raises(ZeroDivisionError):
        run.train()
    messages = [r.message for r in caplog.records if "hardly train" in r.message]
    assert [message.partition(" at a")[0] for message in messages] == short
    assert all(f"give it {0.1 / rate:.0f} steps" in message for message in messages)


class Counts(TrainerCallback):
    """Adds the number of its steps to a list that its copies share."""

    def __init__(self, seen: list[int]) -> None:
        self.steps, self.seen = 0, seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        self.seen.append(self.steps)


def test_the_second_phase_has_callbacks_in_their_initial_state(tmp_path: Path) -> None:
    given = Counts([])
    method_trainer(tmp_path, [given], method=LayerScales(), retrain="warm", max_steps=3).train()
    assert given.seen == [1, 2, 3, 1, 2, 3] and given.steps == 3
