"""`Sources` and its baselines: shares by hand, both drivers of data, resuming, TRL's layouts."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from hyperopt_peft import ProblemError, hypergradient
from hyperopt_peft.core.labels import label_losses
from hyperopt_peft.problems import Agreement, EqualSources, RowWeights, Sources, TrustedRepeated
from hyperopt_peft.trainer.tags import TagCollator, without
from tests.support import language
from tests.support.resume import require_same_end
from tests.support.sources import rows, sources, trainer
from tests.support.watch import SGD

NAMES = ("web", "forum", "trusted")


def test_the_wrong_source_loses(tmp_path: Path) -> None:
    run = trainer(tmp_path, retrain="warm", retrain_arguments={"max_steps": 4})
    run.train()
    shares = run.method.shares()
    assert list(shares) == ["good", "bad", "trusted"] and sum(shares.values()) == pytest.approx(1)
    assert shares["good"] > 2 * shares["bad"]
    records = [record for record in run.state.log_history if "upper_loss" in record]
    assert records[-1]["upper_loss"] < records[0]["upper_loss"]
    last = [record["lower_share_bad"] for record in run.retrainer.state.log_history[:-1]]
    assert last == [pytest.approx(shares["bad"])] * 4  # the second phase has these shares


def whole(run: Any, data: Any) -> Any:
    return run.data_collator([data[row] for row in range(len(data))])


def test_the_first_move_is_the_hypergradient_of_the_trusted_loss(tmp_path: Path) -> None:
    """All rows are in the lower batch, in three micro-batches of different sizes."""
    method = "minres:steps=40,damping=1.0"
    options = {"max_steps": 1, "hypergradient": method, "upper_learning_rate": 1.0, **SGD}
    options |= {"per_device_train_batch_size": 47, "gradient_accumulation_steps": 3}
    run = trainer(tmp_path, double=True, **options)
    batches = {"lower_batch": whole(run, run.train_dataset)}
    batches["upper_batch"] = whole(run, run.upper_dataset)
    losses, _ = label_losses(run.model, without(batches["lower_batch"], ["source"]))
    means = [losses[batches["lower_batch"]["source"] == k].mean() for k in range(3)]
    torch.testing.assert_close(run.lower.loss(batches["lower_batch"])["loss"], sum(means) / 3)
    (expected,) = hypergradient(run.upper, run.lower, method, **batches)
    run.train()
    step = -run.method.logits.detach()
    assert (step - expected).norm() < 1e-6 * expected.norm()  # u is in single precision
    assert expected.norm() > 1e-4


@pytest.mark.parametrize("prior", [None, 0.5])
def test_the_prior_s_default_is_a_variance_of_eight(tmp_path: Path, prior: float | None) -> None:
    """n·τ·½·mean‖u‖² = Σ u²/(2·8) for n trusted rows; of a given τ it is ½·τ·mean‖u‖²."""
    run = trainer(tmp_path, method=Sources(prior=prior))
    u = torch.linspace(-1, 2, 3)
    expected = u.square().sum() / 16 / 30 if prior is None else prior / 2 * u.square().mean()
    torch.testing.assert_close(run.upper.prior([u]), expected)


@pytest.mark.parametrize("stop", [(4, "search"), (2, "retrain")])
def test_it_resumes(tmp_path: Path, stop: Any) -> None:
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 3}
    require_same_end(tmp_path, stop, make=trainer, retrain="scratch", **saving)


def test_baselines_have_their_shares(tmp_path: Path) -> None:
    """Half of the labels of one source are moved, and a head on features sees it."""
    shares: dict[str, Any] = {}
    for method in (EqualSources(), Agreement(), Agreement(log_odds=True)):
        run = trainer(tmp_path, method=method, max_steps=1)
        assert run.upper is None and len(run.train_dataset) == 126
        run.train()
        shares[repr(method)] = torch.tensor([*method.shares().values()])
    equal, agreed, odds = shares.values()
    assert equal.tolist() == pytest.approx([1 / 3] * 3)
    for each in (agreed, odds):
        assert each.sum() == pytest.approx(1) and each[1] < each[0] <= each[2] * 48 / 30 + 1e-6
    assert odds[1] / odds[0] < agreed[1] / agreed[0]
    run = trainer(tmp_path, method=TrustedRepeated(times=3))
    assert len(run.train_dataset) == 96 + 3 * 30


def test_agreement_weighs_by_the_log_odds_of_three_classes(tmp_path: Path) -> None:
    """log(2·q/(1 − q)) by the largest, q the share that is predicted, with 1 of 3 labels more."""
    half = concatenate_datasets([rows(24, 2), rows(24, 4, wrong=True)])
    parts = {"good": rows(48, 1), "bad": half}
    data = concatenate_datasets([p.add_column("source", [n] * 48) for n, p in parts.items()])
    found = []
    for odds in (False, True):
        run = trainer(tmp_path, data=data, method=Agreement(log_odds=odds), max_steps=1)
        found.append(run.method.agreement[:2].double())
    q, weights = found
    right = q * (48 + 3) - 1
    torch.testing.assert_close(right, right.round(), rtol=0, atol=1e-4)
    expected = (2 * q / (1 - q)).log()
    assert 0 < expected[1] < expected[0]
    torch.testing.assert_close(weights, expected / expected[0], rtol=1e-4, atol=0)


def spelled(value: Any, letters: str) -> Any:
    """``value`` with its letters replaced by some of ``letters``."""
    if isinstance(value, str):
        pattern = rf"\b[{language.LETTERS}]\b"
        return re.sub(pattern, lambda m: letters[ord(m[0]) % len(letters)], value)
    if isinstance(value, list):
        return [spelled(each, letters) for each in value]
    if isinstance(value, dict):
        return {name: spelled(each, letters) for name, each in value.items()}
    return value


def texts(name: str, layout: str = "completion", count: int = 12) -> Dataset:
    """Rows whose letters no other source has."""
    number = NAMES.index(name)
    letters = language.LETTERS[5 * number : 5 * number + 5]
    return Dataset.from_list(spelled(language.rows(layout, count, seed=number).to_list(), letters))


def over_trl(
    folder: Path, callbacks: Sequence[Any] = (), *, layout: str = "completion", **settings: Any
) -> Any:
    """Over SFTTrainer: two sources and the trusted rows."""
    support = pytest.importorskip("tests.support.over_trl")
    parts = [texts(n, layout).add_column("origin", [n] * 12) for n in NAMES]
    sets = {"train_dataset": concatenate_datasets(parts[:2]), "upper_dataset": parts[2]}
    if layout == "flat":
        settings |= {"padding_free": True, "max_length": None}
    common = {
        "max_steps": 4,
        "lower_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "upper_learning_rate": 0.3,
        "bf16": False,
        "gradient_checkpointing": False,
        "retrain": "none",
    }
    kind = support.DPOTrainer if layout == "preference" else support.SFTTrainer
    options = {"callbacks": callbacks, "options": sets, **common, **settings}
    return support.made(folder, kind, Sources(column="origin"), layout, **options)


@language.with_logits
@pytest.mark.parametrize("layout", ["text", "completion", "messages", "packed", "flat"])
def test_every_label_has_its_source(tmp_path: Path, layout: str) -> None:
    """f = Σ v_k(t) ℓ_t / N, and its mixed derivative by dot products, in packs of all sources."""
    run = over_trl(tmp_path, layout=layout)
    run.model.eval()
    batch = whole(run, run.train_dataset)
    source = batch["source"]
    if source.dim() == 1:
        source = source[:, None].expand_as(batch["labels"])
    tokens = language.tokenizer().convert_ids_to_tokens(batch["input_ids"].flatten())
    for token, number in zip(tokens, source.flatten().tolist(), strict=True):
        assert token not in language.LETTERS or language.LETTERS.index(token) // 5 == number
    losses, scored = label_losses(run.model, without(batch, ["source"]))
    counts = source[scored].bincount()
    assert counts.tolist() == run.method.counts.tolist()
    torch.nn.init.normal_(run.method.logits)
    p = run.method.logits.softmax(0)
    expected = sum(p[k] * losses[source == k].sum() / counts[k] for k in range(3))
    torch.testing.assert_close(run.lower.loss(batch)["loss"], expected)

    held_out, w = whole(run, run.upper_dataset), run.lower.variables
    goal = torch.autograd.grad(run.task_loss(held_out), w)
    slopes = [
        torch.autograd.grad(losses[source == k].sum(), w, retain_graph=True) for k in range(3)
    ]
    dots = torch.stack([sum((a * b).sum() for a, b in zip(each, goal)) for each in slopes])
    value = run.upper.prior(run.upper.variables) - (p * dots / counts).sum()
    (expected,) = torch.autograd.grad(value, run.method.logits)
    data = {"upper_batch": held_out, "lower_batch": batch}
    (slope,) = hypergradient(run.upper, run.lower, "darts:xi=1.0,product=dots", **data)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.skipif(not language.with_logits.args[0], reason="SFTTrainer's models return logits")
def test_a_head_of_trl_without_logits_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"loss and logits.*trl>=1\.15"):
        over_trl(tmp_path).train()


@language.with_logits
def test_equal_weights_have_the_loss_of_the_trainer(tmp_path: Path) -> None:
    """Of micro-batches of a step too, with the entries that weight unequal ones."""
    run = over_trl(tmp_path, layout="packed")
    run.lower.weights = lambda batch: torch.ones(batch["source"].shape)
    run.model.eval()
    parts = [run.data_collator([run.train_dataset[k] for k in ks]) for ks in ([0, 1, 2], [13])]
    entered = run.with_entries(parts)
    ours = [run.lower.loss(part)["loss"] for part in entered]
    torch.testing.assert_close(sum(ours), sum(map(run.task_loss, entered)), check_dtype=False)
    assert not torch.isclose(sum(ours), sum(run.lower.loss(part)["loss"] for part in parts))


def test_rows_that_are_joined_in_another_way_are_refused() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    rows = [{"input_ids": [5, 6], "source": 0}, {"input_ids": [7, 8], "source": 1}]
    for made in (ids, ids.expand(3, 3)):
        with pytest.raises(ProblemError, match=r"source.* 2 rows with"):
            TagCollator(lambda _, made=made: {"labels": made}, ["source"])(rows)


REFUSED: dict[str, tuple[Any, str]] = {
    "a loss of its own": (
        lambda d: over_trl(d, loss_type="dft").train(),
        "loss_type='dft': .*row_losses",
    ),
    "a smooth loss": (
        lambda d: trainer(d, label_smoothing_factor=0.01).train(),
        "label_smoothing_factor: .*row_losses",
    ),
    "pairs": (
        lambda d: over_trl(d, layout="preference"),
        "labels: the batch must have",
    ),
    "cut texts": (lambda d: over_trl(d, layout="wrapped"), "packing_strategy.*'bfd'"),
    "one source": (lambda d: trainer(d, data=rows(9, 1)), "column 'source': .*two or more"),
    "no trusted rows": (lambda d: trainer(d, trusted=False), "upper_dataset: "),
    "no rows": (lambda d: trainer(d, method=RowWeights(), trusted=False), "upper_dataset"),
    "an unknown paper": (
        lambda _: Sources.published("x"),
        "paper must be 'scalebio' or .*, got 'x'",
    ),
    "trusted rows in both": (lambda d: trainer(d, trusted=sources().select(range(5))), "5 of 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ProblemError, match=message):
        make(tmp_path)


@language.with_logits
@pytest.mark.slow
def test_packs_resume(tmp_path: Path) -> None:
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 3}
    require_same_end(tmp_path, (4,), make=over_trl, layout="packed", **saving)
