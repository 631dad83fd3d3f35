"""The methods of `mix_plans`, each against its definition."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from hyperopt_peft import hypergradient
from hyperopt_peft.engine.fit import lbfgs
from hyperopt_peft.problems.common import TaskLevel
from hyperopt_peft.problems.data_sources import Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import HeldOut
from hyperopt_peft.problems.features import Features
from hyperopt_peft.problems.head import Head, L2Penalty
from hyperopt_peft.problems.head_mix import SOLVER, HeadMix, Plan
from hyperopt_peft.problems.head_rows import HeadRows
from hyperopt_peft.problems.mix_plans import (
    BELOW_HALF,
    FILTERED,
    LABEL_MODEL,
    LOG_ODDS,
    agreement,
    below_half,
    coordinates,
    equal,
    filtered,
    label_model,
    learned,
    learned_then,
    log_odds,
    methods_of,
    sources_alike,
    then_trusted,
    trusted_only,
    with_setting,
    without_one,
)
from tests.support.head_rows import ROWS, as_probabilities, by_soft_votes, by_source, by_votes, mix


def predicted_by_trusted(made: HeadMix) -> Tensor:
    """The classes of the sources' rows, by a head that another solver trains."""
    rows = made.rows
    head = Head(rows.sources.x.shape[1], rows.outputs)
    level = TaskLevel(head, head.named_parameters(), prior=L2Penalty(head))
    lbfgs(level, rows.trusted.batch())
    return head(rows.sources.x).logits.argmax(1)


def test_a_plan_is_trained_to_the_minimum_of_its_rows() -> None:
    """Without a source: those of the others alone, of equal weights."""
    made = mix()
    head = made.fit(Plan(torch.tensor([1.0, 0.0, 1.0, 1.0])))
    rows = made.rows
    chosen = rows.groups != 1
    alone = Head(rows.sources.x.shape[1], rows.outputs)
    lbfgs(
        TaskLevel(alone, alone.named_parameters(), prior=L2Penalty(alone)),
        {
            "features": torch.cat([rows.sources.x[chosen], rows.trusted.x]),
            "labels": torch.cat([rows.sources.labels[chosen], rows.trusted.labels]),
        },
    )
    torch.testing.assert_close(head.weight, alone.weight, rtol=0, atol=2e-3)


def test_a_training_on_trusted_rows_starts_where_the_first_one_ended() -> None:
    """A large penalty holds the head there, and a small one leads to the trusted rows' own."""
    made = mix()
    first = made.fit(equal(made))
    assert torch.allclose(
        made.fit(with_setting(then_trusted(made), 1e4)).weight, first.weight, atol=1e-3
    )
    near, far = (
        made.losses(made.fit(with_setting(then_trusted(made), x))).mean() for x in (10.0, 0.01)
    )
    assert far < near < made.losses(first).mean()
    alone = made.fit(trusted_only(made))
    assert torch.equal(alone.weight, made.trusted_head.weight)
    small = made.fit(with_setting(trusted_only(made), 0.01))
    assert made.losses(small).mean() < made.losses(alone).mean()


def test_a_row_s_loss_is_the_mean_of_its_tokens() -> None:
    """A trusted row without a token that is scored has none."""
    made = mix("tokens")
    head, trusted = made.trusted_head, made.rows.trusted
    each = torch.nn.functional.cross_entropy(
        head(trusted.x).logits, trusted.labels, reduction="none"
    )
    torch.testing.assert_close(made.losses(head), each.view(8, 4).mean(1))
    silent = replace(made.rows, trusted=trusted.select(torch.arange(7)))
    assert made.losses(head, silent).tolist() == [*made.losses(head).tolist()[:7], 0.0]


def test_simple_weights() -> None:
    made = mix("votes")
    assert trusted_only(made).a.tolist() == [0, 0, 0, 1] and trusted_only(made).trusted_only
    assert equal(made).a.tolist() == [1, 1, 1, 1] and not equal(made).trusted_only
    assert then_trusted(made).then_trusted
    counts = dict(zip(made.rows.names, [16, 16, 16, 18], strict=True))
    weights = SourceWeights(counts)
    weights.logits.data = sources_alike(made).logits
    assert weights.shares().tolist() == pytest.approx([0.25] * 4, rel=1e-4)


def test_a_setting_repeats_the_trusted_rows() -> None:
    """The head is that of data in which each of them is three times."""
    made = mix()
    head = made.fit(with_setting(equal(made), 3.0))
    rows, alone = made.rows, Head(5, made.rows.outputs)
    lbfgs(
        TaskLevel(alone, alone.named_parameters(), prior=L2Penalty(alone)),
        {
            "features": torch.cat([rows.sources.x, rows.trusted.x.repeat(3, 1)]),
            "labels": torch.cat([rows.sources.labels, rows.trusted.labels.repeat(3)]),
        },
    )
    torch.testing.assert_close(head.weight, alone.weight, rtol=0, atol=2e-3)


def test_where_a_fit_starts_does_not_matter() -> None:
    made = mix()
    plan = Plan(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    start = made.fit(equal(made))
    torch.testing.assert_close(
        made.fit(plan, start).weight, made.fit(plan).weight, rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("kind", ["rows", "votes"])
def test_agreement_and_its_log_odds(kind: str) -> None:
    """With one right and two wrong answers more."""
    made = mix(kind)
    predicted, rows, expected = predicted_by_trusted(made), made.rows, []
    for source in range(3):
        if kind == "votes":
            votes = rows.groups[:, source]
            right, count = (votes == predicted).sum(), (votes != -1).sum()
        else:
            own = rows.groups == source
            right, count = (rows.sources.labels == predicted)[own].sum(), own.sum()
        expected.append(float((right + 1) / (count + 3)))
    a = agreement(made).a
    assert a.tolist() == pytest.approx([*expected, 1.0]) and a[0] > a[2] > a[1]
    q = torch.tensor(expected)
    odds = (2 * q / (1 - q)).log().clamp(min=0)
    assert log_odds(made).a.tolist() == pytest.approx([*(odds / odds.max()).tolist(), 1.0])
    assert log_odds(made).a[1] == 0


def test_rows_and_votes_that_disagree_are_left_out() -> None:
    made = mix()
    agree = made.rows.sources.labels == predicted_by_trusted(made)
    assert torch.equal(filtered(made).groups, made.rows.groups.where(agree, -1))
    made = mix("votes")
    agree = made.rows.groups == predicted_by_trusted(made)[:, None]
    assert torch.equal(filtered(made).groups, made.rows.groups.where(agree, -1))


def test_rows_of_tokens_agree_by_halves_and_numbers_by_the_median() -> None:
    made = mix("tokens")
    agree = (made.rows.sources.labels == predicted_by_trusted(made)).float().view(-1, 4).mean(1)
    expected = (agree >= 0.5)[made.rows.sources.row]
    assert 0 < expected.sum() < len(expected)
    assert torch.equal(filtered(made).groups != -1, expected)
    made = mix("numbers")
    losses = made.losses_of(made.trusted_head, made.rows.sources)
    assert torch.equal(
        filtered(made).groups != -1, losses <= losses.quantile(0.5, interpolation="higher")
    )


def test_where_no_row_agrees_the_trusted_ones_are_left() -> None:
    rows = by_source()
    wrong = replace(rows.sources, labels=(predicted_by_trusted(mix()) + 1) % 3)
    assert filtered(HeadMix(replace(rows, sources=wrong))).trusted_only


def test_of_a_sample_no_row_is_filtered() -> None:
    made = mix("tokens")
    assert FILTERED in methods_of(made)
    few = replace(made.rows, sampled=torch.tensor([0.5, 1, 1, 1]))
    assert FILTERED not in methods_of(HeadMix(few))


def _voted(accuracies: list[float], count: int = 3000, classes: int = 4) -> tuple[HeadRows, Tensor]:
    """Votes of given accuracies on a half of the rows each, whose features say nothing."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, classes, (count + 4,), generator=generator)
    size = len(accuracies)
    votes = torch.full((count + 4, size + 1), -1)
    for source, accuracy in enumerate(accuracies):
        wrong = torch.rand(len(truth), generator=generator) > accuracy
        step = torch.randint(1, classes, truth.shape, generator=generator)
        votes[:, source] = (truth + step * wrong) % classes
    votes[:, :size][torch.rand(len(truth), size, generator=generator) < 0.5] = -1
    of_trusted = votes[count:, :size].clone()
    votes[count:, :size], votes[count:, size] = -1, truth[count:]
    features = Features(torch.zeros(count + 4, 1), truth, torch.arange(count + 4))
    names = (*map(str, range(size)), "trusted")
    return HeadRows.of(names, features, votes, outputs=classes, trusted_votes=of_trusted), truth


def test_a_label_model_weighs_votes_by_the_accuracies_that_it_finds() -> None:
    """It is right where the Bayes rule of the true accuracies is, and more than a majority."""
    accuracies = [0.9, 0.85, 0.4, 0.4, 0.4, 0.1]
    rows, truth = _voted(accuracies)
    plan = label_model(HeadMix(rows))
    assert plan.groups is not None and bool((plan.groups[:, 1:] == -1).all())
    known = torch.tensor(accuracies)
    odds = (known / (1 - known) * 3).log()
    hits = torch.nn.functional.one_hot(rows.groups.clamp(min=0), 4) * (rows.groups != -1)[..., None]
    bayes = (hits * odds[:, None]).sum(1)
    voted = hits.sum((1, 2)) > 0
    of_rows = truth[: len(voted)][voted]

    def right(found: Tensor) -> float:
        return float((found[voted] == of_rows).float().mean())

    assert right(plan.groups[:, 0]) > right(bayes.argmax(1)) - 0.01
    assert right(plan.groups[:, 0]) > right(hits.sum(1).argmax(1)) + 0.03


def test_the_probabilities_of_one_class_make_the_plans_of_votes() -> None:
    """Of every method; of others the agreement is the probability of the model's class."""
    votes = mix("votes", steps=2)
    soft = replace(votes, rows=by_soft_votes(sure=1.0))
    for name, method in methods_of(votes).items():
        expected, found = method(votes), method(soft)
        torch.testing.assert_close(found.a, expected.a, rtol=1e-3, atol=1e-4, msg=name)
        if expected.groups is not None:
            assert found.groups is not None
            assert torch.equal(found.groups, as_probabilities(expected.groups)), name
    unsure, predicted = by_soft_votes(sure=0.4), predicted_by_trusted(votes)
    found = filtered(replace(votes, rows=unsure)).groups
    kept = votes.rows.groups == predicted[:, None]  # of three classes, the most likely one
    assert found is not None and torch.equal(found, unsure.groups * kept[..., None])
    assert torch.equal(below_half(replace(votes, rows=unsure)).a, below_half(votes).a)
    less = replace(votes, rows=by_soft_votes(sure=0.8))
    for of_less, of_votes in zip(agreement(less).a[:3], agreement(votes).a[:3], strict=True):
        # 16 votes, of which one right and two wrong ones are the prior's.
        hits = float(of_votes) * 19 - 1
        assert float(of_less) == pytest.approx((0.8 * hits + 0.1 * (16 - hits) + 1) / 19)


def test_without_the_worst_source() -> None:
    """Each of the three is tried."""
    made = mix()
    plans = [Plan(torch.ones(4).index_fill(0, torch.tensor([k]), 0)) for k in range(3)]
    losses = [made.objective(plan) for plan in plans]
    assert torch.equal(without_one(made).a, plans[losses.index(min(losses))].a)
    assert without_one(made).a[1] == 0


def test_a_coordinate_search_ends_no_higher_than_every_single_step() -> None:
    """And with these rows at the best of all subsets."""
    made = mix()
    subsets = [Plan(torch.tensor([*a, 1.0])) for a in product([0.0, 1.0], repeat=3) if any(a)]
    losses = [made.objective(plan) for plan in subsets]
    found = coordinates(made)
    assert made.objective(found) == pytest.approx(min(losses), rel=1e-3)
    assert made.objective(found) <= made.objective(without_one(made)) + 1e-5


def test_sources_below_a_half_are_out() -> None:
    rows = by_votes()
    assert below_half(HeadMix(rows)).a.tolist() == [1, 0, 0, 1]
    silent = replace(rows, trusted_votes=torch.full((18, 3), -1))  # one half exactly
    assert below_half(HeadMix(silent)).a.tolist() == [1, 1, 1, 1]


def test_the_search_follows_the_hypergradient() -> None:
    """Its first step of Adam has the sign of −dF/du; the bad source loses."""
    made = mix(steps=1, rate=0.1)
    rows = made.rows
    weights = SourceWeights(dict(zip(rows.names, [24, 24, 24, 18], strict=True)))
    head = Head(5, 3)
    lower = Mixture(head, weights, prior=L2Penalty(head))
    batches = {"upper_batch": rows.trusted.batch(), "lower_batch": rows.batch(rows.groups)}
    lbfgs(lower, batches["lower_batch"])
    upper = HeldOut(head, weights, prior=0.0)
    (slope,) = hypergradient(upper, lower, SOLVER, **batches)
    found = made.search()
    torch.testing.assert_close(found.logits.detach(), -0.1 * slope.sign(), rtol=1e-3, atol=1e-4)
    record = made.history[0]
    assert list(record["shares"].values()) == pytest.approx([24 / 90] * 3 + [18 / 90])
    assert record["upper_loss"] == pytest.approx(made.objective(equal(made)), rel=1e-3)
    assert record["residual"] <= 0.011


@pytest.mark.parametrize("kind", ROWS)
def test_learned_weights_find_the_good_source(kind: str) -> None:
    made = mix(kind)
    a = learned(made).a
    assert a[0] > 2 * a[1] and a[0] > 2 * a[2]
    assert made.objective(learned(made)) < made.objective(equal(made))
    assert learned_then(made) == replace(learned(made), then_trusted=True)
    assert made.passes > learned(made).passes > 8
    first, last = made.history[0]["upper_loss"], made.history[-1]["upper_loss"]
    assert len(made.history) == 8 and last < first


def test_the_prior_s_default_is_that_of_the_adapter_s_search() -> None:
    """τ = K/(8·n), and 0 lets the weights go further."""
    given, default, free = (mix(prior=prior) for prior in (4 / (8 * 18), None, 0.0))
    assert torch.equal(given.learned.a, default.learned.a)
    assert free.learned.logits.norm() > default.learned.logits.norm()


@pytest.mark.parametrize("kind", ROWS)
def test_every_method_of_the_rows_is_a_plan(kind: str) -> None:
    made = mix(kind, steps=2)
    methods = methods_of(made)
    assert (LABEL_MODEL in methods) == (BELOW_HALF in methods) == ("votes" in kind)
    assert (LOG_ODDS in methods) == (kind != "numbers")
    for method in methods.values():
        plan = method(made)
        assert plan.a.shape == (4,) and bool(((plan.a >= 0) & (plan.a <= 1)).all())
        assert bool(made.losses(made.fit(plan)).isfinite().all())
