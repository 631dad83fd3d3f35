"""Scores for a linear head on the model's frozen features: exact, and in seconds.

    dΦ/dv_i = −1/C ⟨∇ℓ_i, H⁻¹∇Φ⟩   at the minimum of 1/C Σ_i v_i ℓ_i(W) + ½·λ·‖W‖²

C is the number of labels, ℓ_i the summed loss of row i, H the Hessian of the head's loss. At the
minimum the influence function (Koh & Liang 2017, arXiv:1703.04730) is the exact derivative.
Retraining without rows starts from the present minimum. For the minimum and the choice of λ see
`heads.minimum`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from hyperopt_peft.attribution.rows import ModelOnRows, NumberedRows, TrainerData
from hyperopt_peft.attribution.run import Training
from hyperopt_peft.attribution.scores import Evaluation, Trained
from hyperopt_peft.core.labels import RowLosses
from hyperopt_peft.heads.features import Features, features_of
from hyperopt_peft.heads.head import Head, head_of, require_head
from hyperopt_peft.heads.minimum import choose_l2, end_of_grid, gram_of, level_of, solve
from hyperopt_peft.trainer.tags import without
from hyperopt_peft.utils.restore import assign_, perturbed

#: The largest entry of the gradient at a minimum, smaller than a single row's part.
TOLERANCE = 1e-7


class HeadTraining(Training):
    """The minimum over ``head`` of the weighted loss on the ``features`` of ``count`` rows.

    ``tolerance`` is the largest entry of the gradient at a minimum.
    """

    tolerance = TOLERANCE

    def __init__(
        self, head: Head, features: Features, count: int, l2: float, rule: RowLosses | None = None
    ) -> None:
        weights = head.weight.new_ones(count, requires_grad=True)
        self.level = level_of(head, weights, l2, rule)
        self.features = features
        self.on_rows = ModelOnRows(head, rule=rule)
        super().__init__(weights, self.level.variables)
        begin = time.perf_counter()
        gram = gram_of(features, head.config.num_labels)
        self._to_minimum = partial(solve, self.level, features.batch(), gram=gram, l2=l2)
        self._to_minimum(tolerance=self.tolerance)
        seconds = time.perf_counter() - begin
        self.settings = {"model": "head", "l2": l2, "l2_end": end_of_grid(l2), "seconds": seconds}
        self.visits += 1
        with torch.no_grad():
            sums, counts = (x.double().cpu() for x in self.on_rows.losses(features.batch()))
        labels = torch.zeros_like(self.losses).index_add(0, features.row.cpu(), counts)
        self.losses.index_add_(0, features.row.cpu(), sums).div_(labels + (labels == 0))

    @contextmanager
    def repeated(self, weights: Tensor) -> Iterator[None]:
        """The minimum with ``weights`` for v."""
        with perturbed((self.weights, *self.variables)):
            assign_((self.weights,), (weights,))
            self._to_minimum(tolerance=self.tolerance)
            yield


def train_head(
    data: TrainerData, *, progress: bool, largest: bool = True
) -> tuple[HeadTraining, Callable[[NumberedRows], Features]]:
    """Train a head on standardised features of the training rows; the model does not change.

    The second result returns features of other rows, with the training rows' mean and deviation.
    """
    model, args, collate = data.model, data.trainer.args, data.collate
    (first,) = data.batches(data.train_rows, [0])
    require_head(model, without(first, collate.tags))
    data.require_losses()

    def features(rows: NumberedRows) -> Features:
        return features_of(
            model,
            rows.data,
            collate.collate,
            batch_size=args.per_device_eval_batch_size,
            precision=data.trainer.compute_loss_context_manager,
            progress=progress,
        )

    raw = features(data.train_rows)
    train = raw.standardized().to(args.device)
    head = head_of(model, train)
    l2 = choose_l2(head, train, largest=largest, progress=progress, rule=data.rule)
    training = HeadTraining(head, train, len(data.train_rows), l2, data.rule)
    return training, lambda rows: features(rows).standardized(raw).to(args.device)


def trained_head(data: TrainerData, progress: bool) -> Trained:
    """Train a head on features of the training rows, and return its run and Φ; see `attribute`."""
    training, read = train_head(data, progress=progress)
    on_rows, train, above = training.on_rows, training.features, read(data.evaluation_rows)
    return Trained(
        training,
        Evaluation(training.weights, on_rows.mean([above.batch()])),
        training.level,
        train.batch,
        probabilities=lambda rows: on_rows.probabilities([train.batch()])[rows],
        labels=data.classes(),
        columns=data.shown[0],
        progress=progress,
    )
