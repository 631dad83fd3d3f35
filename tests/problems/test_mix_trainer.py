"""`MixTrainer`: the bad source loses, and everything is trained with the learned weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, default_data_collator

from hyperopt_peft import ProblemError, hypergradient
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.problems.data_sources import Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import HeldOut
from hyperopt_peft.problems.head_mix import Plan
from hyperopt_peft.problems.mix_arguments import MixTrainingArguments
from tests.support import mix_in_processes as in_processes
from tests.support import two_processes
from tests.support.mix_runs import rows, sources, trainer, votes
from tests.support.resume import Stop, StopAt, interrupted, require_same_end
from tests.support.trainers import peft_model, values
from tests.support.watch import SGD

LAUNCHER = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_the_bad_source_loses(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    weights, shares = run.row_weights(), run.shares()
    assert weights["good"] > 2 * weights["bad"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["good"] == pytest.approx(weights["good"] * 48 / 126, rel=1e-5)


def test_everything_is_trained_from_the_initial_values(tmp_path: Path) -> None:
    """With the learned weights, which stay: the second phase is one of its own."""
    small = {"per_device_train_batch_size": 16}
    run = trainer(tmp_path, gradient_accumulation_steps=2, **small)
    begin = values(run.model)
    run.train()
    learned = run.weights.logits.detach().clone()
    again = trainer(tmp_path / "again", max_steps=1, upper_learning_rate=0.0, **small)
    with torch.no_grad():
        again.weights.logits.copy_(learned)
    again.train()
    assert torch.equal(again.weights.logits, learned)
    for name, value in values(run.model).items():
        assert torch.allclose(value, values(again.model)[name], atol=1e-6), name
    assert any(not torch.equal(value, begin[name]) for name, value in values(run.model).items())
    assert run.retrainer is not None
    assert run.retrainer.args.gradient_accumulation_steps == 1
    assert run.retrainer.train_dataset["source"][-1] == 2  # the trusted rows


def test_trusted_rows_are_in_both_levels(tmp_path: Path) -> None:
    """The first move of u is the hypergradient of the mean trusted loss.

    All rows are in the lower batch, 3 micro-batches of 42.
    """
    method = "minres:steps=40,damping=1.0"
    options = {"max_steps": 1, "hypergradient": method, "upper_learning_rate": 1.0, **SGD}
    options |= {"per_device_train_batch_size": 42, "gradient_accumulation_steps": 3}
    run = trainer(tmp_path, double=True, retrain="none", **options)
    model = peft_model(dropout=0.0, dora=False).double()
    weights = SourceWeights({"good": 48, "bad": 48, "trusted": 30}).double()
    columns = run.data.everything.column_names
    lower_batch, upper_batch = (
        default_data_collator(list(part.select_columns(columns)))
        for part in (run.data.everything, run.data.trusted)
    )
    lower, upper = Mixture(model, weights), HeldOut(model, weights)
    batches = {"upper_batch": upper_batch, "lower_batch": lower_batch}
    (expected,) = hypergradient(upper, lower, method, **batches)
    run.weights.double()
    run.train()
    step = -run.weights.logits.detach()
    assert (step - expected).norm() < 1e-7 * expected.norm()  # the tolerance of the solver
    assert expected.norm() > 1e-4


def test_a_resumed_retraining_reads_the_learned_weights(tmp_path: Path) -> None:
    def make(folder: Path, callbacks: Any = (), **settings: Any) -> Any:
        return trainer(folder, callbacks, save_strategy="steps", save_steps=3, **settings)

    interrupted(tmp_path, (4, "retrain"), make)
    learned = checkpoint.read_state(tmp_path / "learned.pt")["logits"]
    run = make(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert torch.equal(run.weights.logits, learned) and learned[0] > learned[1]
    (tmp_path / "learned.pt").unlink()
    with pytest.raises(ProblemError, match=r"learned\.pt"):
        make(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("stops", [[(4,)], [(2, "retrain")], [(7,), (4, "retrain")]])
def test_both_phases_resume(tmp_path: Path, stops: Any) -> None:
    def make(folder: Path, callbacks: Any = (), **settings: Any) -> Any:
        made = trainer(folder, callbacks, **settings)
        made.remove_callback(PrinterCallback)
        return made

    require_same_end(
        tmp_path,
        *stops,
        make=make,
        max_steps=9,
        save_strategy="steps",
        save_steps=3,
        logging_steps=3,
        gradient_accumulation_steps=2,
    )


@pytest.mark.slow  # tests/trainer has the fast guard of two processes
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Each with half of every micro-batch: the weights of the sources, and the adapter."""
    two = two_processes.run(LAUNCHER, "mix_in_processes.py", tmp_path)
    for name, value in in_processes.train(tmp_path / "one", 8).items():
        assert torch.equal(two[0][name], two[1][name]), name
        assert (two[0][name] - value).norm() <= 1e-9 * value.norm(), name


def test_a_retraining_reads_as_many_rows_as_the_search_on_the_adapter() -> None:
    options = {"max_steps": 6, "report_to": "none", "use_cpu": True}
    accumulation = {"gradient_accumulation_steps": 16, "retrain_gradient_accumulation_steps": 3}
    for search, steps in (("adapter", 32), ("head", 6)):
        args = MixTrainingArguments("outputs", search=search, **options, **accumulation)
        assert args.for_retraining().max_steps == steps


def test_a_training_by_a_plan_resumes_in_either_phase(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "retrain_steps": 8, "search": "head"}
    plan = Plan(torch.tensor([0.9, 0.1, 0.8]), then_trusted=True)
    whole = trainer(tmp_path / "whole", **saves)
    whole.retrain(plan)
    # The folder of the second phase is none that ends with "retrain".
    for step, phase in ((3, "retrain"), (3, "search")):
        with pytest.raises(Stop):
            trainer(tmp_path / "run", [StopAt(step, phase)], **saves).retrain(plan, resume=True)
    run = trainer(tmp_path / "run", **saves)
    run.retrain(plan, resume=True)
    for name, value in values(whole.model).items():
        assert torch.equal(value, values(run.model)[name]), name


def test_passes_of_the_search_are_counted_in_micro_batches(tmp_path: Path) -> None:
    """3 micro-batches in each of 2 lower steps, and F once in 2 pieces, an upper step."""
    options = {"max_steps": 8, "lower_steps": 2, "gradient_accumulation_steps": 3}
    options["hypergradient"] = "direct"
    run = trainer(tmp_path, trusted=rows(40, 3), **options)
    assert run.search_passes() == 4 * (2 * 3 + 2)


@pytest.mark.parametrize(("search", "sure"), [("adapter", None), ("adapter", 0.9), ("head", 0.9)])
def test_votes_of_labelling_functions(tmp_path: Path, search: str, sure: float | None) -> None:
    """Of which one is wrong by a class, and a column of text does not matter."""
    data = votes(60, sure=sure).add_column("text", ["words"] * 60)
    run = trainer(tmp_path, data=data, search=search)
    run.train()
    weights = run.row_weights()
    assert weights["0"] > 2 * weights["1"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: .* MixTrainer"),
        ({"data": {"good": rows(9, 1)}}, "two or more"),
        ({"trusted": sources()["good"].select(range(5))}, "5 of 5"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, options: Any, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        trainer(tmp_path, **options)


@pytest.mark.parametrize(("kind", "name"), [("classes", "minres"), ("causal", "darts")])
def test_the_default_estimator_is_that_of_rows_or_tokens(
    tmp_path: Path, kind: str, name: str
) -> None:
    run = trainer(tmp_path, kind=kind, hypergradient="auto")
    assert run.estimator.name == name and run.args.hypergradient == "auto"
    assert (run.train_dataset["source"][:] == [0] * 24 + [1] * 24 + [2] * 9) == (kind == "causal")
    counts = [24 * 5, 24 * 5, 9 * 5] if kind == "causal" else [48, 48, 30]
    assert run.weights.counts.tolist() == counts


@pytest.mark.parametrize(("weight", "expected"), [(None, None), (0.0, 0.0), (0.5, 0.5)])
def test_the_prior_s_default_is_a_variance_of_eight(
    tmp_path: Path, weight: float | None, expected: float | None
) -> None:
    """n·τ·½·mean‖u‖² = Σ u²/(2·8) for n trusted rows; of a given τ it is ½·τ·mean‖u‖²."""
    run = trainer(tmp_path, upper_prior=weight)
    assert run.upper is not None
    prior, (u,) = run.upper.prior, run.upper.variables
    assert prior is not None
    with torch.no_grad():
        u.copy_(torch.linspace(-1, 2, len(u)))
        n, squares = len(run.data.trusted), float(u.square().sum())
        value = squares / 16 / n if expected is None else expected / 2 * squares / len(u)
        assert float(prior([u])) == pytest.approx(value)
