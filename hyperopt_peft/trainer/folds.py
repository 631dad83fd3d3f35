"""Cross-fitting in a `BilevelTrainer`: the rows, the batches and the levels of K folds.

A row of the lower level's data trains in every fold, a trusted row (of the upper level's data) in
all folds but its own, where it is above. The collator makes of the rows of a batch one batch for
each fold, so that a level sees rows of its own and no number of a fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from transformers.trainer_utils import has_length

from hyperopt_peft.core.cross_fit import Folds, PerFold, cross_fit, split_folds
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.accumulation import ITEMS, scored_labels
from hyperopt_peft.trainer.checks import shifts_labels
from hyperopt_peft.trainer.data import classes_of, label_column
from hyperopt_peft.trainer.upper_batches import loader_of
from hyperopt_peft.utils import distributed

if TYPE_CHECKING:
    from hyperopt_peft.trainer.trainer import BilevelTrainer


class FoldRow(NamedTuple):
    """A row of a data set, and the folds in whose batches it is."""

    row: Any
    folds: Sequence[int]


class Part(NamedTuple):
    """A fold's part of a batch.

    ``batch`` is None where the fold has no labels. ``weight`` is their number at first, and
    `weighted` makes it the weight of the part's mean loss in the step.
    """

    batch: Any
    weight: Any


class FoldRows(Dataset[Any]):
    """The rows of ``data``, each a `FoldRow` with its entry of ``folds``.

    Example:
        >>> FoldRows(["a", "b"], [(0, 1), (1,)])[1]
        FoldRow(row='b', folds=(1,))
    """

    def __init__(self, data: Any, folds: Sequence[Sequence[int]]) -> None:
        self.data, self.folds = data, folds

    def __len__(self) -> int:
        return len(self.folds)

    def __getitem__(self, index: int) -> FoldRow:
        return FoldRow(self.data[index], self.folds[index])


class FoldCollator:
    """Makes of `FoldRow`\\ s a `PerFold` of a `Part` for each fold, and of other rows a batch.

    Args:
        collate: makes a batch of a list of rows.
        folds: the number of folds K.
        count: the number of labels in a batch that are scored; None where it has no labels, and
            the rows count.

    Example:
        >>> collate = FoldCollator(list, 2, count=lambda batch: None)
        >>> collate([FoldRow("a", (0, 1)), FoldRow("b", (1,))])
        (Part(batch=['a'], weight=1), Part(batch=['a', 'b'], weight=2))
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Any]], Any],
        folds: int,
        *,
        count: Callable[[Any], int | Tensor | None],
    ) -> None:
        self.collate, self.folds, self.count = collate, folds, count

    def __call__(self, rows: Sequence[Any]) -> Any:
        """The batch of ``rows``."""
        if not isinstance(rows[0], FoldRow):
            return self.collate(rows)
        of_fold = ([each.row for each in rows if k in each.folds] for k in range(self.folds))
        return PerFold(map(self._part, of_fold))

    def _part(self, rows: Sequence[Any]) -> Part:
        if not rows:
            return Part(None, 0)
        batch = self.collate(rows)
        labels = self.count(batch)
        count = len(rows) if labels is None else int(labels)
        return Part(batch if count else None, count)


class OnPart(Problem):
    """A fold's level whose batch is a `Part`: loss and metrics times the weight, 0 without labels.

    ``metrics`` has a zero for each metric that any fold's level has returned.
    """

    def __init__(self, level: Problem, metrics: dict[str, float]) -> None:
        self.level, self.metrics = level, metrics
        named = zip(level.names, level.variables, strict=True)
        super().__init__(named, prior=level.prior, name=level.name)
        level.prior = None  # `cross_fit` gives it to the joint level

    def evaluate(self, batch: Part) -> tuple[Tensor, dict[str, float]]:
        """The weighted loss and the weighted metrics."""
        if batch.batch is None:
            nothing = [(variable * 0).sum() for variable in self.variables]
            return torch.stack(nothing).sum(), dict(self.metrics)
        loss, metrics = self.level.evaluate(batch.batch)
        self.half = self.level.half
        self.metrics |= dict.fromkeys(metrics, 0.0)
        weight = float(batch.weight) if metrics else 1.0
        metrics = {name: weight * value for name, value in metrics.items()}
        return loss * batch.weight.to(loss.dtype), metrics


def cross_fitted(trainer: BilevelTrainer, lower: Any, upper: Any) -> tuple[Folds, Folds, Any]:
    """The joint upper and lower level of the folds, and the folds' adapters.

    The functions ``lower`` and ``upper`` are called for each fold, with its adapter active. The
    data sets and the collator of ``trainer`` become those of folds.

    Raises:
        ProblemError: as `cross_fit` and `AdapterFolds`; or a setting that cross-fitting excludes.
    """
    # Here, because only this function needs PEFT.
    from hyperopt_peft.adapters.folds import AdapterFolds

    _check(trainer, lower, upper)
    count = trainer.args.cross_fit
    assert count is not None
    _fold_data(trainer, count)
    first = lower(trainer), upper(trainer)
    adapters = AdapterFolds(trainer.model, count, shared=first[1].variables)
    pairs = [first]
    for k in range(1, count):
        with adapters.alone(k):
            pairs.append((lower(trainer), upper(trainer)))
    lowers, uppers = (_on_parts(levels) for levels in zip(*pairs, strict=True))
    return *cross_fit(uppers, lowers, within=adapters.active), adapters


def _on_parts(levels: Sequence[Problem]) -> list[OnPart]:
    metrics: dict[str, float] = {}
    return [OnPart(level, metrics) for level in levels]


def _fold_data(trainer: BilevelTrainer, count: int) -> None:
    """Replace the trainer's data sets by `FoldRows` and its collator by a `FoldCollator`."""
    args, below, above = trainer.args, trainer.train_dataset, trainer.upper_dataset
    for data, name in ((below, "train_dataset"), (above, "upper_dataset")):
        loader_of(trainer, data, name)  # before the columns of a row are out of the Trainer's sight
    column = label_column(above) if hasattr(above, "column_names") else None
    of_row = split_folds(
        len(above),
        count,
        seed=args.seed if args.data_seed is None else args.data_seed,
        classes=classes_of(above, column) if column else None,
    )
    every = range(count)
    others = [tuple(k for k in every if k != own) for own in of_row]
    trainer.train_dataset = FoldRows(
        ConcatDataset([below, above]), [*[tuple(every)] * len(below), *others]
    )
    trainer.upper_dataset = FoldRows(above, [(own,) for own in of_row])
    collate = loader_of(trainer, [None], "train_dataset").collate_fn  # removes columns from rows
    shifted = shifts_labels(trainer.model)
    trainer.data_collator = FoldCollator(
        collate, count, count=partial(scored_labels, shifted=shifted)
    )


def _check(trainer: BilevelTrainer, lower: Any, upper: Any) -> None:
    args = trainer.args
    sampling = (
        str(getattr(args, "train_sampling_strategy", "")),
        getattr(args, "group_by_length", 0),
    )
    names = ("gradient_checkpointing", "activation_checkpointing")  # of older and newer versions
    checkpointing = any(getattr(args, n, False) for n in names) or _checkpoints(trainer.model)
    exact = args.estimator().requirements.second_derivatives
    refused = {
        "levels without functions": (
            isinstance(lower, Problem) or isinstance(upper, Problem),
            "each fold has levels of its own; give functions of the trainer that make them",
        ),
        "a stream as train_dataset": (
            not has_length(trainer.train_dataset),
            "trusted rows are trained below too; give a data set with a length",
        ),
        "group_by_length": (
            "group_by_length" in sampling[0] or sampling[1],
            "a batch is one of each fold; leave it out",
        ),
        "dispatch_batches": (
            args.accelerator_config.dispatch_batches,
            "a batch of folds cannot be sliced; leave it out",
        ),
        "FSDP2": (trainer.is_fsdp_enabled, "it shards one adapter; use DDP"),
        "gradient checkpointing": (
            exact and checkpointing,
            "an exact product runs forward passes again after another fold's adapter is active; "
            "choose product=difference",
        ),
    }
    for name, (given, reason) in refused.items():
        if given:
            raise ProblemError(f"cross_fit: not possible with {name}, since {reason}")


def _checkpoints(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def weighted(trainer: BilevelTrainer, batches: Sequence[Any], *, above: bool) -> list[PerFold]:
    """``batches``, the micro-batches of a step, with the weights of their parts' mean losses.

    With c_ipk labels in fold k's part of micro-batch i on process p, of n and P, the weight of a
    part makes the mean over micro-batches and processes the mean over labels:

        below    weight_ipk = c_ipk · nP / Σ_ip c_ipk        f_k: the mean over the fold's labels
        above    weight_ipk = c_ipk · nPK / Σ_ipk c_ipk      F: the mean over all labels

    Args:
        trainer: the trainer of the folds.
        batches: `PerFold` batches of a `FoldCollator`.
        above: whether the batches are those of the upper level.
    """
    device = trainer.args.device
    # Apple's devices have no floats of 64 bits.
    exact = torch.float32 if device.type == "mps" else torch.float64
    counts = torch.tensor([[part[1] for part in each] for each in batches], dtype=exact)
    counts = counts.to(device)
    total = counts.mean().expand(counts.shape[1]) if above else counts.mean(0)
    total = distributed.average(total.contiguous())
    weights = counts / total.where(total > 0, 1)
    return [
        PerFold(
            Part(_with_items(trainer, batch, count), weight)
            for (batch, count), weight in zip(each, row, strict=True)
        )
        for each, row in zip(batches, weights, strict=True)
    ]


def _with_items(trainer: BilevelTrainer, batch: Any, count: int) -> Any:
    """``batch`` with the number of its labels where the Trainer's loss reads the number."""
    reads = shifts_labels(trainer.model) or trainer.own_loss or trainer.compute_loss_func
    if batch is None or not reads or not hasattr(batch, "keys"):
        return batch
    factor = distributed.world_size() if trainer.args.average_tokens_across_devices else 1
    return {**batch, ITEMS: torch.tensor(count * factor, device=trainer.args.device)}
