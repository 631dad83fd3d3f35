"""Baselines of a learned mix: what wins where, what it costs, and what it leaves alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Value
from transformers import TrainerCallback

from hyperopt_peft import ProblemError
from hyperopt_peft.problems import MixTrainer
from hyperopt_peft.problems.compare_baselines import (
    BaselineComparison,
    MethodResult,
    compare_baselines,
    split_folds,
)
from hyperopt_peft.problems.compare_on_adapter import runs_of, works_of
from hyperopt_peft.problems.example_weights import example_losses
from hyperopt_peft.problems.head_mix import Plan
from hyperopt_peft.problems.mix_baselines import Baselines, alike
from hyperopt_peft.problems.mix_plans import (
    AGREEMENT,
    BELOW_HALF,
    COORDINATES,
    EQUAL,
    FILTERED,
    LABEL_MODEL,
    LEARNED,
    LEARNED_THEN,
    LOG_ODDS,
    SOURCES_ALIKE,
    TRUSTED_ONLY,
    WITHOUT_ONE,
    coordinates,
    methods_of,
    without_one,
)
from tests.support.mix_runs import rows, trainer, voted, votes
from tests.support.trainers import values


def test_the_table_is_in_the_order_of_losses_and_names_the_best() -> None:
    losses = torch.tensor([0.1, 0.3, 0.5])
    best = MethodResult("best", losses, passes=90)
    worse = MethodResult("worse", losses + torch.tensor([0.1, 0.2, 0.3]), passes=30)
    near = MethodResult("near", losses + torch.tensor([0.1, -0.1, 0.1]), passes=30)
    comparison = BaselineComparison([worse, best], untrained=losses + 0.01)
    assert comparison.best is best and comparison.ties == [] and not comparison.near_chance
    with_tie = BaselineComparison([worse, near, best], untrained=near.losses)
    assert with_tie.ties == [near] and with_tie.near_chance
    assert "tie" in with_tie.sentence and "near" in with_tie.sentence
    assert "better than chance" in str(with_tie) and "better than chance" not in str(comparison)
    assert ["tie" in line for line in str(with_tie).splitlines()[1:4]] == [False, True, False]
    assert worse.difference(best) == pytest.approx((0.2, 0.1 / 3**0.5))
    _, first, second, advice = str(comparison).splitlines()
    assert first.split() == ["best", "0.3000", "90"]
    assert second.split() == ["worse", "0.5000", "+0.2000", "±", "0.0577", "30"]
    assert "use best" in advice


def test_what_looks_at_nothing_is_used_unless_another_is_better_by_its_error() -> None:
    losses = torch.tensor([0.1, 0.3, 0.5])
    plain = MethodResult(SOURCES_ALIKE, losses, passes=30)
    luck = MethodResult("lucky", losses - torch.tensor([0.3, -0.1, 0.0]), passes=9)
    better = MethodResult("better", losses - torch.tensor([0.1, 0.2, 0.1]), passes=90)
    found = BaselineComparison([plain, luck])
    assert found.best is luck and found.recommended is plain
    assert found.sentence.startswith(f"use {SOURCES_ALIKE}") and "of lucky" in found.sentence
    assert BaselineComparison([plain, luck, better]).recommended is better
    assert BaselineComparison([luck, better]).recommended is better


def test_sources_that_count_alike_have_the_same_share_whatever_their_sizes() -> None:
    shares = alike({"small": 3, "large": 300, "trusted": 30}).shares()
    assert torch.allclose(shares, torch.full((3,), 1 / 3), atol=1e-4)


@pytest.mark.parametrize(("classes", "largest"), [([0] * 7, 3), (["a"] * 4 + ["b"] * 3, 3)])
def test_every_fold_has_its_share_of_every_class(classes: Any, largest: int) -> None:
    folds = split_folds(classes, 3, seed=1)
    for name in set(classes):
        counts = torch.tensor([int(folds[k]) for k, c in enumerate(classes) if c == name])
        assert int(counts.bincount(minlength=3).max()) <= largest
        assert int(counts.bincount(minlength=3).min()) >= len(counts) // 3
    assert (folds == split_folds(classes, 3, seed=1)).all()
    for k in (1, 8):
        with pytest.raises(ProblemError, match="from 2 to 7"):
            split_folds(classes, k)


def test_a_wrong_source_is_exposed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal weights lose, nothing is printed, and model and weights are left as they were."""
    run = trainer(tmp_path)
    run.train()
    before, weights = values(run.model), run.row_weights()
    capsys.readouterr()
    comparison = compare_baselines(run, folds=2, equal_passes=False)
    assert capsys.readouterr().out == ""
    by_name = {result.method: result for result in comparison.results}
    assert [*by_name] == [*methods_of(run.head_mix)]  # as on the head
    assert all(len(result.losses) == 30 for result in by_name.values())
    for good in (LEARNED, AGREEMENT, LOG_ODDS, FILTERED, WITHOUT_ONE, COORDINATES):
        assert by_name[good].loss < by_name[EQUAL].loss
    assert by_name[LEARNED].passes > by_name[TRUSTED_ONLY].passes
    assert run.row_weights() == weights
    with Baselines(run) as baselines:  # by any rows
        baselines.train(EQUAL, baselines.steps, run.data)
        equal = baselines.losses(rows(60, 9)).mean()
        baselines.train(TRUSTED_ONLY, baselines.steps, run.data)
        assert baselines.losses(rows(60, 9)).mean() < equal
    for name, value in values(run.model).items():
        assert torch.equal(value, before[name]), name


def test_a_killed_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the finished trainings of the same settings alone, the last line cut by the kill."""
    counts, train, record = [0], Baselines.train, tmp_path / "folds.jsonl"

    def killed_at(last: int) -> None:
        def counted(self: Any, *args: Any) -> int:
            counts[0] += 1
            if counts[0] == last:
                raise KeyboardInterrupt
            return train(self, *args)

        counts[0] = 0
        monkeypatch.setattr(Baselines, "train", counted)

    def compared(**options: Any) -> BaselineComparison:
        run = trainer(tmp_path / "run", max_steps=1, retrain_steps=1, **options)
        run.train()
        return compare_baselines(run, folds=2, equal_passes=False, record=record)

    # Learned weights, then the trusted rows: the last one, whose weights are in the record.
    killed_at(22)
    with pytest.raises(KeyboardInterrupt):
        compared()
    record.write_text(f"{record.read_text()}{{")
    killed_at(0)
    resumed = compared()
    assert counts == [1]
    record.unlink()
    whole = compared()
    assert str(resumed) == str(whole) and resumed.row_weights == whole.row_weights
    assert len(whole.row_weights) == 2 and {*whole.row_weights[0]} == {"good", "bad", "trusted"}
    killed_at(1)
    with pytest.raises(KeyboardInterrupt):
        compared(learning_rate=1e-3)


def test_the_head_of_a_fold_has_its_weights_and_the_best_constant(tmp_path: Path) -> None:
    run = trainer(tmp_path, search="head", retrain="none")
    run.train()
    comparison = compare_baselines(run, folds=2)
    assert len(comparison.row_weights) == 2
    assert all(fold["good"] > fold["bad"] for fold in comparison.row_weights)
    # That of the classes' shares in the other fold, of three classes.
    assert comparison.untrained is not None
    assert float(comparison.untrained.mean()) == pytest.approx(1.1, abs=0.2)
    assert not comparison.near_chance


class Count(TrainerCallback):
    """Counts the runs that it is in."""

    runs = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.runs += 1


def test_a_fold_has_the_prior_of_its_trusted_rows_and_no_callback_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a run that was resumed in the retraining, without a step of the search."""
    count, priors, train = Count(), [], MixTrainer.train
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, **options).train()
    run = trainer(tmp_path, [count], **options)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 0

    def spied(self: Any) -> Any:
        priors.append((self.upper.prior.weight, len(self.data.trusted)))
        return train(self)

    monkeypatch.setattr(MixTrainer, "train", spied)
    compare_baselines(run, folds=2, equal_passes=False)
    assert priors == [(pytest.approx(3 / (8 * n)), n) for n in (15, 15)]
    assert count.runs == 0


@pytest.mark.parametrize(("equal_passes", "retrain"), [(True, "scratch"), (False, "none")])
def test_baselines_have_the_steps_of_the_retraining_or_all_passes(
    tmp_path: Path, equal_passes: bool, retrain: str
) -> None:
    """In passes over a micro-batch, of which a step of the retraining has 2."""
    accumulation = {"gradient_accumulation_steps": 3, "retrain_gradient_accumulation_steps": 2}
    options = {"max_steps": 4, "retrain_steps": 3, "lower_steps": 2, **accumulation}
    run = trainer(tmp_path, retrain=retrain, **options)
    with pytest.raises(ProblemError, match="train first"):
        compare_baselines(run)
    run.train()
    comparison = compare_baselines(run, folds=2, equal_passes=equal_passes)
    passes = {result.method: result.passes for result in comparison.results}
    expected = (6 if retrain == "scratch" else 0) + run.search_passes()
    assert passes.pop(LEARNED) == expected
    assert passes.pop(LEARNED_THEN) == run.search_passes() + 6
    for method, count in passes.items():
        before = {AGREEMENT: 1, LOG_ODDS: 1, FILTERED: 1, WITHOUT_ONE: 2, COORDINATES: 3}
        longest = expected + expected % 2 if equal_passes else 6
        assert count - 6 * before.get(method, 0) in {6, longest}


@pytest.mark.parametrize("kind", ["votes", "soft votes", "tokens"])
def test_votes_and_sequences_are_judged_too(tmp_path: Path, kind: str) -> None:
    sure = 0.8 if kind == "soft votes" else None
    data = None if kind == "tokens" else votes(40, sure=sure)
    trusted = None if data is None else voted(rows(30, 3), sure)
    kind = "tokens" if data is None else "classes"
    run = trainer(tmp_path, kind=kind, data=data, trusted=trusted, max_steps=4)
    run.train()
    comparison = compare_baselines(run, folds=2, equal_passes=False)
    assert all(result.losses.isfinite().all() for result in comparison.results)
    methods = {result.method for result in comparison.results}
    of_votes = {LABEL_MODEL, LOG_ODDS, BELOW_HALF}
    assert methods & of_votes == (of_votes if data is not None else set())


def test_a_method_trains_the_adapter_by_its_own_look_at_the_sources(tmp_path: Path) -> None:
    """A model of the trusted rows, and trainings without a source, are those of the adapter."""
    run = trainer(tmp_path)
    with Baselines(run) as baselines:
        baselines.train(TRUSTED_ONLY, baselines.steps, run.data)
        logits = run.predict(run.data.sources.remove_columns("source")).predictions
        assert baselines.predictions().tolist() == logits.argmax(-1).tolist()
        expected = example_losses(run.model, run.data_collator(run.train_dataset.to_list()[:96]))
        torch.testing.assert_close(baselines.source_losses(), expected.detach())
        losses = []
        for plan in (torch.tensor([0.0, 1, 1]), torch.tensor([1.0, 0, 1])):
            losses.append(baselines.objective(Plan(plan)))
        assert losses[0] > losses[1]  # the second source is wrong
        assert without_one(baselines).a.tolist() == coordinates(baselines).a.tolist() == [1, 0, 1]


def test_whole_numbers_are_classes_where_the_model_reads_them_as_such(tmp_path: Path) -> None:
    """However many there are in a fold, and though the rows of texts have them in a column."""
    table = rows(30, 3).cast_column("labels", Value("int64"))
    few = {"a": rows(4, 1).cast_column("labels", Value("int64")), "b": table.select(range(4, 8))}
    run = trainer(tmp_path, data=few, trusted=table.select(range(3)))
    assert LOG_ODDS in Baselines(run).methods and Baselines(run).rows.outputs == 3
    run.of_classes = False  # as of a language model, which reads no column of classes
    assert LOG_ODDS not in Baselines(run).methods and Baselines(run).rows.numbers


def test_what_several_methods_look_at_is_counted_once(tmp_path: Path) -> None:
    baselines = Baselines(trainer(tmp_path))
    runs = runs_of(baselines, equal_passes=True)
    trainings = sum(count for count, _ in works_of(baselines, runs))
    # Of each run, of the model of the trusted rows, and of the two sources left out.
    assert trainings == len(runs) + 1 + 2 + 3
