"""The cross-validated losses of all methods on a head: a fold that is judged never trains."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from hyperopt_peft.problems import head_mix
from hyperopt_peft.problems.compare_on_head import TEMPERATURES, losses_on_head
from hyperopt_peft.problems.head_mix import HeadMix
from hyperopt_peft.problems.mix_plans import (
    EQUAL,
    LEARNED,
    LEARNED_THEN,
    equal,
    methods_of,
    settings_of,
)
from tests.support.head_rows import ROWS, mix

FOLDS = 2


def folds(made: HeadMix) -> torch.Tensor:
    return torch.arange(made.rows.n) % FOLDS


@pytest.mark.parametrize("kind", ["votes", pytest.param("tokens", marks=pytest.mark.slow)])
def test_a_row_that_is_judged_never_trains(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lower batch before a judgement has its rows, and no upper one; those of the others do."""
    made, trained, judged = mix(kind, steps=2), set(), []
    lbfgs, open_oracle, losses = head_mix.lbfgs, head_mix.open_oracle, HeadMix.losses

    def of(x: torch.Tensor) -> set[Any]:
        return set(map(tuple, x.tolist()))

    def solved(level: Any, batch: Any) -> int:
        trained.update(of(batch["features"]))
        return lbfgs(level, batch)

    def opened(*levels: Any, upper_batch: Any, lower_batch: Any) -> Any:
        trained.update(of(upper_batch["features"]) | of(lower_batch["features"]))
        return open_oracle(*levels, upper_batch=upper_batch, lower_batch=lower_batch)

    def judge(self: HeadMix, head: Any, rows: Any = None) -> Any:
        if rows is not None and rows.trusted.x.shape[1] > 1:  # no constant
            held_out = of(rows.trusted.x)
            assert not held_out & trained
            assert not trained or of(made.rows.trusted.x) - held_out <= trained
            trained.clear()
            judged.append(rows.n)
        return losses(self, head, rows)

    monkeypatch.setattr(head_mix, "lbfgs", solved)
    monkeypatch.setattr(head_mix, "open_oracle", opened)
    monkeypatch.setattr(HeadMix, "losses", judge)
    results = losses_on_head(made, folds(made))
    assert sum(judged) == len(results.losses) * len(TEMPERATURES) * made.rows.n


def test_losses_are_those_of_the_head_of_the_other_folds() -> None:
    """With one temperature for all folds, that of the least loss."""
    made = mix()
    fold_of_row = folds(made)
    results = losses_on_head(made, fold_of_row)
    logits = torch.zeros(made.rows.n, made.rows.outputs)
    for fold in range(FOLDS):
        rows = (fold_of_row == fold).nonzero().flatten()
        inside = HeadMix(made.rows.with_trusted((fold_of_row != fold).nonzero().flatten()))
        logits[rows] = inside.fit(equal(inside))(made.rows.trusted.x[rows]).logits.detach()
    labels = made.rows.trusted.labels
    each = [cross_entropy(logits / t, labels, reduction="none") for t in TEMPERATURES]
    expected = min(each, key=lambda losses: float(losses.mean()))
    torch.testing.assert_close(results.losses[EQUAL, 1.0], expected, rtol=1e-3, atol=1e-4)
    assert results.losses[LEARNED, 1.0].mean() < expected.mean()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROWS)
def test_every_method_has_losses_and_a_price(kind: str) -> None:
    """And each of its settings has; a search is paid by all that use it."""
    made = mix(kind, steps=2)
    results = losses_on_head(made, folds(made))
    settings = {name: [x for n, x in results.losses if n == name] for name, _ in results.losses}
    assert list(settings) == list(methods_of(made))
    assert all(tuple(tried) == settings_of(name) for name, tried in settings.items())
    for run, losses in results.losses.items():
        assert losses.shape == (made.rows.n,) and bool(losses.isfinite().all())
        assert results.passes[run] > 0
    passes = results.passes
    assert passes[LEARNED_THEN, 0.1] > passes[LEARNED, 1.0] > passes[EQUAL, 1.0]
    assert made.passes == 0
