"""Variants of BiDoRA that are trainers of their own: a split that rotates, and hyper-magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from hyperopt_peft import BilevelTrainer, Problem
from hyperopt_peft.adapters import split_parameters, use_fast_dora
from hyperopt_peft.problems import BiDoRATrainer, BiDoRATrainingArguments
from hyperopt_peft.problems.common import Adapter, TaskLevel
from hyperopt_peft.problems.two_phases import TwoPhaseTrainer
from hyperopt_peft.trainer.upper_batches import UpperBatches


class Rotating(BiDoRATrainer):
    """All rows are for both levels: those of an upper batch are not in the lower steps before it.

    The upper batches of an epoch are disjoint. Of ``per_device_upper_batch_size`` rows each.
    """

    may_share_rows = True

    def __init__(
        self, model: Any, args: BiDoRATrainingArguments, *, train_dataset: Dataset, **trainer: Any
    ) -> None:
        super().__init__(
            model, args, train_dataset=train_dataset, upper_dataset=train_dataset, **trainer
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of the lower level."""
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset, batch_sampler=list(self._rows()), collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def _rows(self) -> Iterator[list[int]]:
        args, every = self.args, range(len(self.train_dataset))
        source = torch.Generator().manual_seed(args.seed)
        size = args.per_device_upper_batch_size
        above = UpperBatches(every, size, seed=args.seed, collate=list)
        for cycle in range(-(-args.max_steps // args.lower_steps)):
            others = torch.tensor(sorted({*every} - {*above.batch(cycle)}))
            order = others[torch.randperm(len(others), generator=source)]
            batches = order.split(args.train_batch_size)[: args.lower_steps]
            yield from (batch.tolist() for batch in batches)


class Pulled(Adapter):
    """min over A, B, m and head of L + ½·Σ_l exp(ρ_l)·mean((m_l − exp(s_l)·m0_l)²).

    Args:
        start: m0, the magnitudes of each layer.
        scales, precisions: s and ρ, a number a layer.
    """

    def __init__(
        self, model: Any, start: list[Tensor], scales: Tensor, precisions: Tensor, **level: Any
    ) -> None:
        super().__init__(model, **level)
        self.start, self.scales, self.precisions = start, scales, precisions
        self.magnitudes = list(split_parameters(model).magnitudes.values())

    def loss(self, batch: Any) -> Tensor:
        """L and the pull."""
        apart = torch.stack(
            [
                (m - scale.exp() * m0).square().mean()
                for m, m0, scale in zip(self.magnitudes, self.start, self.scales, strict=True)
            ]
        )
        return self.task_loss(batch) + 0.5 * (self.precisions.exp() * apart).sum()


class HyperMagnitudes(TwoPhaseTrainer):
    """The upper level has a scale and a precision of each layer's magnitudes in place of them."""

    #: The first precision.
    PRECISION = 10.0

    def __init__(
        self, model: Any, args: BiDoRATrainingArguments, *, train_dataset: Dataset, **trainer: Any
    ) -> None:
        use_fast_dora(model, "full")
        self.start = [m.detach().clone() for m in split_parameters(model).magnitudes.values()]
        self.scales = torch.zeros(len(self.start), requires_grad=True)
        self.precisions = torch.full_like(self.scales, self.PRECISION).log().requires_grad_()
        self.everything, self.options = train_dataset, trainer
        super().__init__(
            model,
            lower=self._lower,
            upper=self._upper,
            args=args,
            train_dataset=train_dataset,
            **trainer,
        )

    def _lower(self, trainer: BilevelTrainer) -> Problem:
        pull = self.start, self.scales, self.precisions
        return Pulled(trainer.model, *pull, task_loss=trainer.task_loss)

    def _upper(self, trainer: BilevelTrainer) -> Problem:
        owned = [("scales", self.scales), ("precisions", self.precisions)]
        return TaskLevel(trainer.model, owned, task_loss=trainer.task_loss)

    def retraining(self, args: Any) -> BilevelTrainer:
        """The trainer of the lower level on all rows."""
        data, options = self.everything, self.options
        return BilevelTrainer(
            self.model, lower=self._lower, upper=None, args=args, train_dataset=data, **options
        )


#: By the name that a study's YAML has.
TRAINERS = {"bidora": BiDoRATrainer, "rotating": Rotating, "hyper-magnitudes": HyperMagnitudes}
