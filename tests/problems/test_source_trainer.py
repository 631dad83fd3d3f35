"""`SourceTrainer`: the bad source loses, and fixed weights are trained with as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import default_data_collator

from hyperopt_peft import ProblemError, hypergradient
from hyperopt_peft.problems.data_sources import Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import HeldOut
from tests.support import sources_in_processes as in_processes
from tests.support import two_processes
from tests.support.resume import require_same_end
from tests.support.source_runs import rows, sources, trainer
from tests.support.trainers import peft_model
from tests.support.watch import SGD

LAUNCHER = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_the_bad_source_loses(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    good, bad, _ = run.weights().tolist()
    shares = run.shares()
    assert good > 2 * bad and list(shares) == ["good", "bad", "trusted"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["good"] == pytest.approx(good * 48 / 126, rel=1e-5)


def all_rows(*parts: Any) -> Any:
    """The rows of ``parts`` as a batch, with the number of their part."""
    batch = default_data_collator([row for part in parts for row in part])
    numbers = [number for number, part in enumerate(parts) for _ in part]
    return {**batch, "source": torch.tensor(numbers)}


def test_trusted_rows_are_in_both_levels(tmp_path: Path) -> None:
    """The first move of u is the hypergradient of the mean trusted loss.

    All rows are in the lower batch, 3 micro-batches of 42.
    """
    method = "minres:steps=40,damping=1.0"
    options = {"max_steps": 1, "hypergradient": method, "upper_learning_rate": 1.0, **SGD}
    options |= {"per_device_train_batch_size": 42, "gradient_accumulation_steps": 3}
    run = trainer(tmp_path, double=True, **options)
    model = peft_model(dropout=0.0, dora=False).double()
    weights = SourceWeights({"good": 48, "bad": 48, "trusted": 30}).double()
    lower, upper = Mixture(model, weights), HeldOut(model, weights)
    trusted = rows(30, 3)
    batches = {"lower_batch": all_rows(*sources().values(), trusted)}
    batches["upper_batch"] = default_data_collator([*trusted])
    (expected,) = hypergradient(upper, lower, method, **batches)
    run.weights.double()
    run.train()
    step = -run.weights.logits.detach()
    assert (step - expected).norm() < 1e-7 * expected.norm()  # the tolerance of the solver
    assert expected.norm() > 1e-4


def test_without_trusted_rows_given_weights_stay(tmp_path: Path) -> None:
    """The first step is that of the weighted loss: by plain SGD its gradient."""
    search = trainer(tmp_path, max_steps=4)
    search.train()
    learned = search.weights.logits.detach().clone()
    options = {"max_steps": 1, "per_device_train_batch_size": 126, **SGD}
    options |= {"learning_rate": 1.0, "max_grad_norm": 0.0}
    parts = {**sources(), "trusted": rows(30, 3)}
    run = trainer(
        tmp_path, data=parts, trusted=False, weights=lambda counts: search.weights, **options
    )
    assert run.upper is None and run.weights is search.weights
    model = peft_model(dropout=0.0, dora=False)
    lower = Mixture(model, search.weights)
    gradient = lower.gradient(all_rows(*parts.values()), lower.variables).gradient
    run.train()
    assert torch.equal(search.weights.logits, learned) and len(gradient) > 1
    for before, slope, after in zip(lower.variables, gradient, run.lower.variables, strict=True):
        torch.testing.assert_close(after, before - slope, rtol=1e-4, atol=1e-6)


def test_the_callers_arguments_stay(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    made = type(run.args)(str(tmp_path), report_to="none", use_cpu=True)
    options = {"sources": sources(), "data_collator": default_data_collator}
    type(run)(peft_model(), made, **options)
    assert made.remove_unused_columns


@pytest.mark.parametrize("stop", [(4,), (7,)])
def test_it_resumes(tmp_path: Path, stop: Any) -> None:
    require_same_end(
        tmp_path,
        stop,
        make=trainer,
        max_steps=9,
        save_strategy="steps",
        save_steps=3,
        logging_steps=3,
        gradient_accumulation_steps=2,
    )


@pytest.mark.slow  # tests/trainer has the fast guard of two processes
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Each with half of every micro-batch: the weights of the sources, and the adapter."""
    two = two_processes.run(LAUNCHER, "sources_in_processes.py", tmp_path)
    for name, value in in_processes.train(tmp_path / "one", 8).items():
        assert torch.equal(two[0][name], two[1][name]), name
        assert (two[0][name] - value).norm() <= 1e-9 * value.norm(), name


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: .* SourceTrainer"),
        ({"data": {"good": rows(9, 1)}}, "two or more"),
        ({"trusted": sources()["good"].select(range(5))}, "5 of 5"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, options: Any, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        trainer(tmp_path, **options)


@pytest.mark.parametrize(("kind", "labels"), [("tokens", 6), ("causal", 5)])
def test_tokens_are_counted_by_their_labels(tmp_path: Path, kind: str, labels: int) -> None:
    run = trainer(tmp_path, kind=kind)
    assert run.train_dataset["source"][:] == [0] * 24 + [1] * 24 + [2] * 9
    assert run.weights.counts.tolist() == [24 * labels, 24 * labels, 9 * labels]


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
        squares = float(u.square().sum())
        value = squares / 16 / 30 if expected is None else expected / 2 * squares / len(u)
        assert float(prior([u])) == pytest.approx(value)
