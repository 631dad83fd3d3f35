"""The verdict on a learnt mix: what wins where, what it costs, and what it leaves alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from hyperopt_peft import ProblemError
from hyperopt_peft.problems import MixTrainer
from hyperopt_peft.problems.mix_verdict import LEARNT, Entry, Verdict, verdict
from tests.support.mix_runs import rows, trainer
from tests.support.trainers import values


def test_the_lowest_loss_is_used_and_a_cheaper_way_is_named() -> None:
    source = torch.Generator().manual_seed(0)
    best = Entry("best", torch.rand(40, generator=source), passes=90)
    noise = 0.1 * torch.randn(40, generator=source)
    near = Entry("near", best.losses + noise - noise.mean() + 1e-4, passes=30)
    far = Entry("far", best.losses + 0.5 + 0.1 * torch.rand(40, generator=source), passes=10)
    found = Verdict([far, near, best])
    assert found.use is found.best is best
    assert "near" in found.sentence and "33%" in found.sentence
    assert "far" not in found.sentence and "90" in str(found)
    assert "far" not in Verdict([far, best]).sentence


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 99)), min_size=1, max_size=6))
def test_nothing_has_a_lower_loss_than_what_is_used(entries: Any) -> None:
    table = [Entry(str(k), torch.full((5,), loss), n) for k, (loss, n) in enumerate(entries)]
    found = Verdict(table)
    assert all(found.use.loss <= entry.loss for entry in table)


def test_a_wrong_source_is_found_out(tmp_path: Path) -> None:
    """Equal weights lose, and the model and the weights of the run are left as they were."""
    run = trainer(tmp_path)
    run.train()
    before, weights = values(run.model), run.row_weights()
    found = verdict(run, folds=2, equal_passes=False)
    by_name = {entry.method: entry for entry in found.entries}
    assert len(by_name) == 6 and all(len(entry.losses) == 30 for entry in found.entries)
    assert by_name[LEARNT].loss < by_name["everything, equal weights"].loss
    assert by_name[LEARNT].passes > by_name["trusted rows only"].passes
    assert run.row_weights() == weights
    for name, value in values(run.model).items():
        assert torch.equal(value, before[name]), name


class Stop(TrainerCallback):
    """Counts the runs that it is in, and would end each of them."""

    runs = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.runs += 1


def test_the_learnt_way_of_a_fold_is_that_of_its_own_trusted_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default prior is by the number of trusted rows; the user's callbacks stay out."""
    stop, priors = Stop(), []
    run = trainer(tmp_path, [stop], max_steps=2)
    run.train()
    train = MixTrainer.train

    def spied(self: MixTrainer) -> Any:
        priors.append((self.args.upper_prior, len(self.data.trusted)))
        return train(self)

    monkeypatch.setattr(MixTrainer, "train", spied)
    verdict(run, folds=2, equal_passes=False)
    assert priors == [(pytest.approx(3 / (8 * n)), n) for n in (15, 15)]
    assert stop.runs == 1


def test_a_run_that_was_resumed_in_the_retraining_has_a_verdict(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, **options).train()
    run = trainer(tmp_path, **options)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 0
    assert verdict(run, folds=2, equal_passes=False).use.losses.isfinite().all()


def test_nothing_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.train()
    assert "train_runtime" in capsys.readouterr().out
    verdict(run, folds=2, equal_passes=False)
    assert capsys.readouterr().out == ""


def test_without_a_retraining_its_passes_are_not_counted(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4, retrain="none")
    run.train()
    found = verdict(run, folds=2)
    learnt = next(entry for entry in found.entries if entry.method == LEARNT)
    assert learnt.passes == run.search_passes()
    assert all(entry.passes <= max(learnt.passes, 5) for entry in found.entries)


@pytest.mark.parametrize("equal_passes", [True, False])
def test_baselines_take_the_steps_of_the_retraining_or_all_passes(
    tmp_path: Path, equal_passes: bool
) -> None:
    """Passes over a micro-batch; a step of the retraining has 2."""
    accumulation = {"gradient_accumulation_steps": 3, "retrain_gradient_accumulation_steps": 2}
    run = trainer(tmp_path, max_steps=4, retrain_steps=3, lower_steps=2, **accumulation)
    with pytest.raises(ProblemError, match="train first"):
        verdict(run)
    run.train()
    found = verdict(run, folds=2, equal_passes=equal_passes)
    learnt = next(entry for entry in found.entries if entry.method == LEARNT)
    assert learnt.passes == 2 * 3 + run.search_passes()
    allowed = {6, learnt.passes} if equal_passes else {6}
    assert {e.passes for e in found.entries if e.method != LEARNT} <= allowed


def test_votes_are_judged_too(tmp_path: Path) -> None:
    below = rows(40, 4)
    right = torch.tensor(below["labels"][:])
    votes = torch.stack([right, (right + 1) % 3], 1)
    votes[::2, 0] = -1
    below = below.remove_columns("labels").add_column("votes", votes.tolist())
    run = trainer(tmp_path, given=below, max_steps=4)
    run.train()
    found = verdict(run, folds=2, equal_passes=False)
    assert all(entry.losses.isfinite().all() for entry in found.entries)
