"""Scores for a linear head on the model's frozen features: exact, and in seconds.

    W* = argmin over W  1/C Σ_i v_i ℓ_i(W) + ½·λ·‖W‖²,    dΦ/dv_i = −1/C ⟨∇ℓ_i, H⁻¹∇Φ⟩

C is the number of labels, ℓ_i the summed loss of row i, H the Hessian of the head's loss. At the
minimum the influence function (Koh & Liang 2017, arXiv:1703.04730) is the exact derivative.
Retraining without rows starts from the present minimum. λ is chosen by cross-validation on the
training rows: the largest λ whose loss is within a standard error of the least (Breiman et al.
1984, §3.4.3). A smaller λ hardly predicts better, and if features outnumber rows, each row then
moves the head so far that derivatives do not predict leaving rows out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from sklearn.model_selection import KFold
from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.attribution.rows import ROW, ModelOnRows, NumberedRows, classes_of_rows
from hyperopt_peft.attribution.run import Training
from hyperopt_peft.attribution.scores import Evaluation, RetrainingSetup
from hyperopt_peft.attribution.trainer import require_trainer
from hyperopt_peft.attribution.trainer_data import TrainerData
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.engine.fit import lbfgs
from hyperopt_peft.problems.features import Features, features_of
from hyperopt_peft.problems.head import Head, head_of, l2_penalty, require_head
from hyperopt_peft.trainer.tags import without
from hyperopt_peft.utils.restore import assign_, perturbed

#: The values of λ for cross-validation, and its folds. With a larger λ a head predicts almost only
#: the most frequent class, and finds fewer wrong labels.
PENALTIES, FOLDS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01), 5
#: The largest entry of the gradient at a minimum, smaller than a single row's part; the same in
#: cross-validation; the largest number of steps.
TOLERANCE, ROUGHLY, STEPS = 1e-7, 1e-3, 2000


def level_of(head: Head, weights: Tensor, l2: float) -> WeightedRows:
    """The weighted loss of ``head`` with the prior ½·λ·‖W‖²."""
    options: Any = {"tags": [ROW], "prior": l2_penalty(l2), "name": "head"}
    return WeightedRows(head, lambda batch: weights[batch[ROW]], **options)


def batch_of(features: Features) -> dict[str, Tensor]:
    """All ``features`` as a batch of a `Head`, with the rows' numbers."""
    return {**features.batch(), ROW: features.row}


def held_out_losses(head: Head, features: Features, count: int, progress: bool = False) -> Tensor:
    """The held-out loss of each label for the first k of `PENALTIES`, ``(k, m)``.

    The search ends with the first λ whose mean loss is more than a standard error above the least:
    a smaller λ is worse and takes more steps. ``head`` does not change.
    """
    folds = KFold(min(FOLDS, count), shuffle=True, random_state=0).split(range(count))
    parts = [[torch.from_numpy(rows) for rows in fold] for fold in folds]
    variables, losses = (head.weight, head.bias), list[Tensor]()
    points = [[x.detach().clone() for x in variables] for _ in parts]  # one per fold
    for l2 in tqdm(PENALTIES, "head", disable=not progress):
        level, held_out = level_of(head, head.weight.new_ones(count), l2), []
        for (train, others), point in zip(parts, points, strict=True):
            with perturbed(variables):
                assign_(variables, point)
                lbfgs(level, batch_of(features.select(train)), tolerance=ROUGHLY)
                point[:] = [x.detach().clone() for x in variables]
                with torch.no_grad():
                    held_out.append(ModelOnRows(head).losses(batch_of(features.select(others)))[0])
        losses.append(torch.cat(held_out))
        if losses[-1].mean() > highest(losses):
            break
    return torch.stack(losses)


def highest(losses: Sequence[Tensor]) -> float:
    """The least mean of ``losses`` and its standard error."""
    least = min(losses, key=lambda each: float(each.mean()))
    return float(least.mean() + least.std() / len(least) ** 0.5)


def chosen_l2(
    head: Head, features: Features, count: int, progress: bool = False, *, largest: bool = True
) -> float:
    """The ``largest`` λ, or else the smallest, within a standard error of the least loss.

    The loss is cross-validated on the ``count`` training rows. ``head`` does not change.
    """
    losses = held_out_losses(head, features, count, progress)
    good = losses.mean(1) <= highest(list(losses))
    return PENALTIES[int(good.nonzero()[0 if largest else -1])]


class HeadTraining(Training):
    """The minimum over ``head`` of the weighted loss on the ``features`` of ``count`` rows.

    ``tolerance`` is the largest entry of the gradient at a minimum.
    """

    tolerance = TOLERANCE

    def __init__(self, head: Head, features: Features, count: int, l2: float) -> None:
        weights = head.weight.new_ones(count, requires_grad=True)
        self.level, self.features = level_of(head, weights, l2), features
        self.on_rows = ModelOnRows(head)
        super().__init__(weights, self.level.variables)
        begin = time.perf_counter()
        self._solve(features)
        self.settings |= {"seconds": time.perf_counter() - begin, "l2": l2}
        self.visits += 1
        with torch.no_grad():
            sums, counts = (x.double().cpu() for x in self.on_rows.losses(batch_of(features)))
        labels = torch.zeros_like(self.losses).index_add(0, features.row.cpu(), counts)
        self.losses.index_add_(0, features.row.cpu(), sums).div_(labels.clamp(min=1))

    def _solve(self, features: Features) -> None:
        lbfgs(self.level, batch_of(features), tolerance=self.tolerance, max_steps=STEPS)

    @contextmanager
    def repeated(self, weights: Tensor) -> Iterator[None]:
        """The minimum with ``weights`` for v."""
        with perturbed((self.weights, *self.variables)):
            assign_((self.weights,), (weights,))
            self._solve(self.features)
            yield

    @contextmanager
    def enlarged(self, features: Features) -> Iterator[None]:
        """The minimum on the training rows and ``features``, all with the weight 1."""
        # All weights are 1 here, so each of these rows may use the first row's.
        like = replace(features, row=torch.zeros_like(features.row))
        with perturbed(self.variables):
            self._solve(Features.joined([self.features, like]))
            yield


def train_head(
    trainer: Any, data: TrainerData, *, progress: bool, largest: bool = True
) -> tuple[HeadTraining, Callable[[NumberedRows], Features]]:
    """Train a head on standardised features of ``trainer``'s rows; its model does not change.

    The second result returns features of other rows, with the training rows' mean and deviation.
    """
    model, count = trainer.model, len(data.train_rows)
    (first,) = data.batches(data.train_rows, [0])
    require_head(model, without(first, data.collate.tags))

    options: Any = {"collate": data.collate.collate, "progress": progress}
    options["batch_size"] = trainer.args.per_device_eval_batch_size
    options["precision"] = trainer.compute_loss_context_manager
    features = lambda rows: features_of(model, rows.data, **options).double()  # noqa: E731
    raw, device = features(data.train_rows), trainer.args.device
    train = raw.standardized().to(device)
    head = head_of(model, train)
    l2 = chosen_l2(head, train, count, progress, largest=largest)
    training = HeadTraining(head, train, count, l2)
    return training, lambda rows: features(rows).standardized(raw).to(device)


def setup_from_head(
    trainer: Any, evaluation: Any, slices: str | None, *, progress: bool
) -> RetrainingSetup:
    """Train a head on features of ``trainer``'s rows, and return its run and Φ; see `attribute`."""
    require_trainer(trainer)
    data = TrainerData(trainer, evaluation, slices)
    training, read = train_head(trainer, data, progress=progress)
    on_rows, train, above = training.on_rows, training.features, read(data.evaluation_rows)
    of_slices = {
        name: on_rows.mean([batch_of(above.select(torch.tensor(rows)))])
        for name, rows in data.groups.items()
    }
    return RetrainingSetup(
        training,
        Evaluation(training.weights, of_slices),
        data.shares,
        training.level,
        lambda: batch_of(train),
        test=lambda test: partial(on_rows.measured, [batch_of(read(data.test_rows(test)))]),
        enlarged=lambda seed: training.enlarged(above),
        probabilities=lambda rows: on_rows.probabilities([batch_of(train)])[rows],
        labels=classes_of_rows(data.batches(data.train_rows)),
        columns=data.shown[0],
    )
