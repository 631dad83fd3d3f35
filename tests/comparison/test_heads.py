"""Heads in place of adapters: each run is a convex minimum."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import default_data_collator

from hyperopt_peft import BiDoRA, BilevelTrainingArguments, Method, ProblemError
from hyperopt_peft.comparison import Comparison, Runs, compare_heads
from hyperopt_peft.heads import L2, Features, Head, features_of
from hyperopt_peft.heads.head import OnFeatures
from hyperopt_peft.problems import (
    Agreement,
    ClassOffsets,
    DoRA,
    EqualSources,
    LoRA,
    RowWeights,
    SomeSources,
    Sources,
    TrustedRepeated,
)
from hyperopt_peft.trainer.splits import hold_out
from tests.support.sources import rows, sources
from tests.support.trainers import base_model, data

#: What the line of a level has that begins at 0 and does not move.
NOTHING = {"steps": 0, "start": 0.0, "moved": 0.0}
TRUSTED, TEST = rows(24, 3), rows(60, 4)
COLUMNS = ["input_ids", "labels"]


def on_heads(methods: Any, **options: Any) -> Comparison:
    own = options.pop("arguments", {})
    args = BilevelTrainingArguments("unused", report_to="none", use_cpu=True, **own)
    kind = options.pop("kind", "classes")
    settings: dict[str, Any] = {
        "train_dataset": sources(24),
        "upper_dataset": TRUSTED,
        "test_dataset": TEST,
        "seeds": [0, 1],
    }
    settings["runs"] = Runs(progress=False)
    model = options.pop("base_model", partial(base_model, kind))
    return compare_heads(methods, model, args, **{**settings, **options})


def features(*tables: Any) -> list[Features]:
    """Those of each table, standardised as all of them but the last."""
    made = [
        features_of(base_model(), x.select_columns(COLUMNS), default_data_collator) for x in tables
    ]
    known = Features.joined(made[:-1])
    return [each.standardized(known) for each in made]


def solved(train: Features, test: Features, weights: Any, l2: float) -> float:
    """The test loss of scikit-learn's minimum."""
    total = len(train.x) if weights is None else sum(weights)
    model = LogisticRegression(C=1 / (l2 * total), tol=1e-8, max_iter=2000)
    model.fit(train.x.numpy(), train.labels.numpy(), weights)
    return float(log_loss(test.labels.numpy(), model.predict_proba(test.x.numpy())))


@pytest.mark.parametrize("l2", [L2, 1.0])
def test_a_run_is_the_minimum_of_its_level(l2: float) -> None:
    """Of all rows of its seed, of the trusted ones, of repeated ones, and of one source."""
    tables = sources(24), TRUSTED
    *known, test = features(*tables, TEST)
    methods = {
        "all": LoRA(),
        "alone": SomeSources(),
        "repeated": TrustedRepeated(3),
        "good": SomeSources(["good"]),
        "alike": EqualSources(),
    }
    comparison = on_heads(methods, l2=l2)
    for seed in (0, 1):
        kept = [torch.tensor(hold_out(x, 0.2, seed, "held_out")[0]) for x in tables]
        web, trusted = (x.select(rows) for x, rows in zip(known, kept))
        good = web.select(kept[0][kept[0] < 24])
        mass = [len(good.x), len(web.x) - len(good.x), len(trusted.x)]
        alike = [1 / mass[int(row >= 24)] for row in web.row] + [1 / mass[2]] * mass[2]
        cases = {
            "all": (Features.joined([web, trusted]), None),
            "alone": (trusted, None),
            "repeated": (Features.joined([web, *[trusted] * 3]), None),
            "good": (Features.joined([good, trusted]), None),
            "alike": (Features.joined([web, trusted]), [sum(mass) / 3 * each for each in alike]),
        }
        for name, (train, weights) in cases.items():
            expected = solved(train, test, weights, l2)
            assert comparison.scores()[name][seed] == pytest.approx(expected, abs=1e-4)
    assert "heads at their minimum" in str(comparison) and "rate" not in comparison.table()


def test_folds_judge_plans_of_data() -> None:
    cases = {
        "alike": EqualSources(),
        "agreement": Agreement(log_odds=True),
        "learned": Sources(),
        "rows": RowWeights(),
    }
    comparison = on_heads(cases, test_dataset=None, seeds=None, folds=3)
    assert comparison.plan.seeds == [0, 1, 2]
    scores = comparison.scores()
    frozen = scores["learned, upper level frozen"]
    assert frozen.tolist() == pytest.approx(scores["alike"].tolist(), abs=1e-6)
    assert scores["learned"].sum() < frozen.sum()
    assert scores[[*cases]].mean().idxmin() in comparison.recommendation()


def test_numbers_are_predicted_too() -> None:
    options = {"train_dataset": data("regression", 20), "upper_dataset": data("regression", 9, 3)}
    options |= {"test_dataset": data("regression", 10, 5), "kind": "regression"}
    scores = on_heads({"all": LoRA(), "alone": SomeSources()}, **options).scores()["all"]
    assert scores.between(0, 10, inclusive="neither").all()


class Kept(ClassOffsets):
    """Keeps what is learned."""

    learned: ClassVar[list[Tensor]] = []

    def finish(self, model: Any) -> Any:
        self.learned.append(self.offsets.detach())
        return model


def balanced(outputs: Any) -> dict[str, float]:
    right = outputs.predictions.argmax(1) == outputs.label_ids
    return {"recall": sum(float(right[outputs.label_ids == c].mean()) for c in range(3)) / 3}


def test_offsets_of_classes_come_near_their_log_shares() -> None:
    """Of 80, 10 and 10 % of the rows, whose features are normal around the class's corner."""
    source, counts = torch.Generator().manual_seed(0), ([240, 30, 30], [60] * 3, [100] * 3)
    classes = [torch.arange(3).repeat_interleave(torch.tensor(each)) for each in counts]
    y = torch.cat(classes)
    x = torch.eye(3)[y] + torch.randn(len(y), 3, generator=source)
    table = Dataset.from_dict({"features": range(len(y)), "labels": y.tolist()})
    ends = torch.tensor([0, *map(len, classes)]).cumsum(0).tolist()
    parts = [table.select(range(*pair)) for pair in pairwise(ends)]
    names = ("train_dataset", "upper_dataset", "test_dataset")
    options: dict[str, Any] = {"metric": "recall", "compute_metrics": balanced}
    options |= {"base_model": lambda: OnFeatures(x, Head(3, 3)), **dict(zip(names, parts))}
    comparison = on_heads({"offsets": Kept()}, **options)
    offsets, shares = Kept.learned[0], torch.tensor([0.8, 0.1, 0.1]).double().log()
    torch.testing.assert_close(offsets - offsets.mean(), shares - shares.mean(), atol=0.3, rtol=0)
    means = comparison.scores().mean()
    assert means["offsets"] - means["offsets, upper level frozen"] > 0.03


@pytest.mark.parametrize("options", [{"l2": 0.0}, {"upper_steps": 0}, {"upper_rate": -1.0}])
def test_options_of_a_head_are_positive(options: Any) -> None:
    with pytest.raises(ProblemError, match=f"^{next(iter(options))} must be"):
        on_heads({"LoRA": LoRA()}, **options)


class Wide(Method):
    """Reads a setting that a head has no use for."""

    def prepare(self, model: Any) -> None:
        self.width = model.config.hidden_size


def halved(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return cross_entropy(outputs.logits, labels) / 2


class Watched(Method):
    """Keeps the numbers of the lower level's rows."""

    seen: ClassVar[list[Any]] = []

    def read_rows(self, model: Any, rows: Any, collate: Any) -> None:
        self.seen.append(Counter(rows["features"][:]))

    def prepare(self, model: Any) -> None:
        self.u = torch.zeros((), requires_grad=True)

    def upper_variables(self, model: Any) -> dict[str, Any]:
        return {"u": self.u}

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        return self.u.exp() * task_loss(batch)


def test_copies_of_a_row_are_in_one_level() -> None:
    copies = [data(rows=24).add_column("idx", [*range(k, k + 24)]) for k in (0, 24)]
    sets = {"train_dataset": concatenate_datasets(copies), "test_dataset": data(rows=9, seed=5)}
    on_heads({"one": Watched(), "two": Watched()}, upper_dataset=None, **sets)
    assert all({*seen.values()} == {2} for seen in Watched.seen)
    assert min(map(len, Watched.seen)) < 19 == max(map(len, Watched.seen))
    every = {frozenset(seen) for seen in Watched.seen if len(seen) == 19}
    assert len(every) == 2  # a set of rows for each seed, of both methods and their ablations


def test_a_line_has_what_the_upper_level_did() -> None:
    """F does not read the shares, so that the direct term is 0 and has no ratio."""
    adam: Any = {"upper_steps": 3, "upper_rate": 0.1}
    comparison = on_heads({"all": LoRA(), "learned": Sources(prior=0.0)}, **adam)
    pairs = comparison.plan.candidates()
    (all_rows, *_), (learned, *_), (frozen, *_) = (comparison.reported(*x) for x in pairs)
    assert "upper" not in all_rows and frozen["upper"] == {**NOTHING, "moved_in_rates": 0.0}
    found = learned["upper"]
    assert found.keys() == {*NOTHING, "moved_in_rates", "residual"} and found["steps"] == 3
    assert 0 < found["moved_in_rates"] <= 3.1 and found["residual"] < 1e-4
    assert found["moved"] >= 0.1 * found["moved_in_rates"] * 3**0.5  # of three logits from 0


def untrusted(kind: str) -> dict[str, Any]:
    """Rows of the task ``kind``, of which none are trusted."""
    rows = {"train_dataset": data(kind, 12), "test_dataset": data(kind, 6, 5)}
    return {"kind": kind, "upper_dataset": None, **rows}


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ({"DoRA": DoRA()}, {}, "DoRA: a head lacks"),
        ({"BiDoRA": BiDoRA()}, {}, "BiDoRA: a head lacks"),
        ({"LoRA": LoRA()}, {"metric": "f1"}, "metric: f1 is none of loss"),
        ({"some": SomeSources(["books"])}, {}, "chosen: no training row has 'books'"),
        ({"LoRA": LoRA()}, untrusted("tokens"), "for each token; call compare_methods"),
        ({"LoRA": LoRA()}, untrusted("causal"), "are text"),
        ({"wide": Wide()}, {}, "wide: a head lacks .*hidden_size"),
        ({"LoRA": LoRA()}, {"compute_loss_func": halved}, "compute_loss_func: .*row_losses"),
        ({"LoRA": LoRA()}, {"arguments": {"label_smoothing_factor": 0.1}}, "factor: .*row_losses"),
        ({"LoRA": LoRA()}, {"passes": 300}, "passes: has no effect on heads.*leave it out"),
        ({"LoRA": LoRA()}, {"frozen_dropout": True}, "frozen_dropout: has no effect on heads"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_one_line(methods: Any, options: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        on_heads(methods, **options)
