"""Is a learned mix worth its price? Its cross-validated trusted loss beside those of baselines."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.compare_on_adapter import losses_on_adapter
from hyperopt_peft.problems.compare_on_head import losses_on_head
from hyperopt_peft.problems.mix_plans import SOURCES_ALIKE
from hyperopt_peft.problems.mix_trainer import MixTrainer
from hyperopt_peft.trainer.data import classes_of, label_column
from hyperopt_peft.utils.tables import aligned


@dataclass(frozen=True)
class MethodResult:
    """One method of training, by the losses of trusted rows that it did not see.

    Attributes:
        method: what was trained.
        losses: the loss of each trusted row, by the model of the folds without it, ``(n,)``.
        passes: forward+backward passes over a micro-batch, of one fold; of a head, over all rows.
        setting: the one of least loss. Of an adapter, the optimizer steps of a training; of a head
            see `mix_plans.settings_of`.
    """

    method: str
    losses: Tensor
    passes: int
    setting: float = 0.0

    @property
    def loss(self) -> float:
        """The cross-validated trusted loss."""
        return float(self.losses.mean())

    def difference(self, other: MethodResult) -> tuple[float, float]:
        """The mean of this method's losses minus ``other``'s, and its standard error."""
        gap = self.losses - other.losses
        return float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))


@dataclass(frozen=True)
class BaselineComparison:
    """The methods with their cross-validated trusted losses.

    Attributes:
        results: a result of each method.
        row_weights: of each fold the learned weights of a row, by source.
        untrained: the losses of a model that has learned nothing of a row, ``(n,)``: on a head the
            best constant, else the adapter's initial values.

    Example:
        >>> one = MethodResult("trusted rows only", torch.tensor([0.5, 0.7, 0.6]), passes=10)
        >>> two = MethodResult("learned weights", torch.tensor([0.1, 0.3, 0.1]), passes=90)
        >>> BaselineComparison([one, two]).recommended.method
        'learned weights'
    """

    results: Sequence[MethodResult]
    row_weights: Sequence[Mapping[str, float]] = ()
    untrained: Tensor | None = None

    @property
    def best(self) -> MethodResult:
        """The result of the lowest trusted loss."""
        return min(self.results, key=lambda result: result.loss)

    @property
    def recommended(self) -> MethodResult:
        """The method to use: everything, unless another one is better by a standard error.

        Of everything each source counts alike: this looks at nothing, and the lowest of many losses
        of few rows is often luck.
        """
        plain = next((r for r in self.results if r.method == SOURCES_ALIKE), self.best)
        return plain if self._tied(plain) else self.best

    @property
    def ties(self) -> list[MethodResult]:
        """The other results that are within one standard error of the best."""
        others = (each for each in self.results if each is not self.best and self._tied(each))
        return sorted(others, key=lambda result: result.loss)

    @property
    def near_chance(self) -> bool:
        """Whether the best method is within two standard errors of a model without training."""
        if self.untrained is None:
            return False
        gap, error = self.best.difference(MethodResult("", self.untrained, 0))
        return not gap < -2 * error

    @property
    def sentence(self) -> str:
        """Which method to use, which are as good, and whether any has learned something."""
        best, text = self.best, f"use {self.recommended.method}: "
        lowest = f"the lowest trusted loss, {best.loss:.4f}"
        if self.recommended is not best:
            text += "within one standard error of "
            lowest += f" of {best.method}"
        text += lowest
        if tied := [each.method for each in self.ties if each is not self.recommended]:
            text += f"; a tie, within one standard error, too: {'; '.join(tied)}"
        if self.near_chance:
            text += (
                ". But that is not better than chance by more than twice its error: give more "
                "trusted rows, or another model"
            )
        return text

    def to_the_best(self, result: MethodResult) -> str:
        """The loss of ``result`` minus the best one's, with its standard error, and a tie."""
        if result is self.best:
            return ""
        gap, error = result.difference(self.best)
        return ("tie, " if self._tied(result) else "") + f"{gap:+.4f} ± {error:.4f}"

    def _tied(self, result: MethodResult) -> bool:
        gap, error = result.difference(self.best)
        return gap <= error

    def __str__(self) -> str:
        rows: list[Sequence[Any]] = [("method", "trusted loss", "to the best", "passes")]
        for each in sorted(self.results, key=lambda result: result.loss):
            rows.append((each.method, f"{each.loss:.4f}", self.to_the_best(each), each.passes))
        return f"{aligned(rows)}\n{self.sentence}"


def compare_baselines(
    trainer: MixTrainer,
    *,
    model: Literal["auto", "head", "adapter"] = "auto",
    folds: int = 3,
    equal_passes: bool = True,
    record: Path | None = None,
) -> BaselineComparison:
    """Compare a trained `MixTrainer` with simple methods, by cross-validation on trusted rows.

    Every method of `mix_plans` trains on all but a fold of the trusted rows and is judged on the
    fold. On a head that needs no training of the adapter, which `MixTrainer.retrain` trains by the
    plan of a method.

    On an adapter a method without a search takes the steps of the retraining and, with
    ``equal_passes``, also as many passes as search and retraining together; the better of the two
    counts. A model of the trusted rows, and each of the at most 12 largest sources left out in turn
    and one after another, take a training of the adapter each in every fold. ``trainer``'s model is
    left as it was. Learned weights cost ``folds`` times what ``trainer`` does, and with
    ``equal_passes`` each of the others as much.

    Args:
        trainer: the trainer, which has trained.
        model: what each method trains; ``auto`` is what the weights were learned on.
        folds: of the trusted rows.
        equal_passes: of an adapter, as above.
        record: of an adapter, a file of finished trainings, with which a killed comparison goes on.

    Raises:
        ProblemError: ``trainer`` has not trained; fewer than 2 folds, or more than trusted rows; on
            the adapter, a text without a label; on a head, a model in shards (FSDP).

    Example:
        >>> from datasets import Dataset
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification, PrinterCallback
        >>> from hyperopt_peft import MixTrainingArguments
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = get_peft_model(BertForSequenceClassification(tiny), LoraConfig())
        >>> def rows(first):
        ...     ids = [[first + k] * 4 for k in range(6)]
        ...     return Dataset.from_dict({"input_ids": ids, "labels": [0, 1] * 3})
        >>> options = {"max_steps": 3, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
        >>> args = MixTrainingArguments("outputs", retrain="none", **options)
        >>> data = {"sources": {"web": rows(1), "books": rows(10)}, "trusted": rows(20)}
        >>> trainer = MixTrainer(model, args, **data)
        >>> trainer.remove_callback(PrinterCallback)
        >>> _ = trainer.train()
        >>> comparison = compare_baselines(trainer, folds=2)
        >>> [result.method for result in comparison.results][-2]
        'learned weights'
    """
    # A run that was resumed in the retraining has no step of the search.
    if not trainer.state.log_history and trainer.retrainer is None:
        raise ProblemError("compare_baselines: the trainer has not trained; call train first")
    trusted = trainer.data.trusted
    on_head = model == "head" or (model == "auto" and trainer.on_head)
    rows = trainer.head_mix.rows.n if on_head else len(trusted)
    classes = classes_of(trusted, label_column(trusted))
    if classes is None or len(classes) != rows:  # some texts have no label
        classes = [0] * rows
    fold_of_row = torch.from_numpy(split_folds(classes, folds, seed=trainer.args.seed))
    if on_head:
        progress = not trainer.args.disable_tqdm
        found = losses_on_head(trainer.head_mix, fold_of_row, progress=progress)
    else:
        found = losses_on_adapter(trainer, fold_of_row, equal_passes=equal_passes, record=record)
    results = [
        MethodResult(method, losses, found.passes[method, setting], setting)
        for (method, setting), losses in found.losses.items()
    ]
    return BaselineComparison(_best(results), found.row_weights, found.untrained)


def _best(results: Sequence[MethodResult]) -> list[MethodResult]:
    """The result of the lowest loss of each method."""
    by_method: dict[str, list[MethodResult]] = {}
    for result in results:
        by_method.setdefault(result.method, []).append(result)
    return [min(same, key=lambda each: each.loss) for same in by_method.values()]


def split_folds(classes: Sequence[Any], folds: int, *, seed: int = 0) -> np.ndarray[Any, Any]:
    """The fold of each row, from 0 and below ``folds``, shuffled by ``seed``.

    The folds are stratified by ``classes``, the class of each row, unless every class has fewer
    rows than there are folds.

    Raises:
        ProblemError: ``folds`` is not from 2 to the number of rows.
    """
    if not 2 <= folds <= len(classes):
        raise ProblemError(
            f"folds: {folds} folds of {len(classes)} rows are not possible; choose from 2 to "
            f"{len(classes)}"
        )
    from sklearn.model_selection import KFold, StratifiedKFold  # a second to import

    kind = StratifiedKFold if max(Counter(classes).values()) >= folds else KFold
    fold_of_row, names = np.zeros(len(classes), dtype=int), list(map(repr, classes))  # of any type
    splitter = kind(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings(action="ignore"):  # some class has fewer rows than folds
        for fold, (_, rows) in enumerate(splitter.split(fold_of_row, names)):
            fold_of_row[rows] = fold
    return fold_of_row
