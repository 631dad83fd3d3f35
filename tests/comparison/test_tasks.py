"""`compare_methods` on each kind of task: classes, tags, numbers, language models, TRL."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hyperopt_peft.comparison import Comparison, compare_methods
from hyperopt_peft.trainer.trainer import bilevel
from tests.support import language
from tests.support.comparisons import ARGUMENTS, METHODS, SHORT, TITLES, compared, passes_of


def require_scores(comparison: Comparison, metric: str = "loss", step: float = 1.0) -> None:
    """Two finite scores of each method and ablation, at the budget to one step."""
    assert comparison.plan.metric == metric
    assert [*comparison.scores()] == TITLES
    assert np.isfinite(comparison.scores()).all(axis=None)
    for result in comparison.store.results.values():
        assert SHORT["passes"] - step < passes_of(result) <= SHORT["passes"]


SLOW = pytest.mark.slow
CASES = [("tokens", 1), ("regression", 2), ("causal", 1)]
CASES += [pytest.param("seq2seq", 1, marks=SLOW), pytest.param("tokens", 4, marks=SLOW)]


@pytest.mark.parametrize(("kind", "pieces"), CASES)
def test_a_task_of_transformers(kind: str, pieces: int) -> None:
    """Tags have an accuracy of their own, language models and numbers a loss."""
    batch = {"per_device_train_batch_size": 4 // pieces, "gradient_accumulation_steps": pieces}
    comparison = compared(METHODS, kind, batch)
    assert comparison.plan.lower_is_better == (kind != "tokens")
    require_scores(comparison, "accuracy" if kind == "tokens" else "loss")


#: An adapter of the last of two layers; the settings of each layout of rows, or of none joined.
LAST = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
FLAT = {"padding_free": True, "max_length": None}


def trained_by_sft(layout: str) -> Comparison:
    """Without checkpointing, which is TRL's default, so that the lower layer may be kept."""
    trl = pytest.importorskip("trl")
    trainer: Any = bilevel(trl.SFTTrainer)
    settings = {**ARGUMENTS, "gradient_checkpointing": False}
    args = trainer.Arguments("unused", **settings, **language.LAYOUTS.get(layout, FLAT))
    train, test = (language.rows(layout, 30, seed) for seed in (0, 1))
    return compare_methods(
        METHODS,
        language.language_model,
        language.lora(**LAST),
        args,
        train_dataset=train,
        test_dataset=test,
        trainer=trainer,
        processing_class=language.tokenizer(),
        **SHORT,
    )


@pytest.mark.parametrize(
    "layout", ["completion", *(pytest.param(x, marks=SLOW) for x in ("text", "messages"))]
)
def test_a_trainer_of_trl(layout: str) -> None:
    """The lower layer is computed once a text, by a model with rotary embeddings."""
    comparison = trained_by_sft(layout)
    require_scores(comparison)
    no_logits = language.with_logits.args[0]
    said = "the model returns no logits" if no_logits else "1 of 2 layers are frozen"
    assert said in str(comparison)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["wrapped", "packed", "flat"])
def test_rows_that_are_packed_or_joined(layout: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A batch whose rows are joined to one is a micro-batch; each split packs its own count."""
    comparison = trained_by_sft(layout)
    require_scores(comparison)
    joined = "every layer is computed in each pass" in str(comparison)
    assert joined == (layout != "wrapped")
    assert "examples/s" not in capfd.readouterr().err  # no bars of the rows' preparation
