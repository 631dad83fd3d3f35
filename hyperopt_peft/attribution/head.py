"""Scores on a linear head of the model's frozen features: exact, and in seconds.

    W* = argmin over W  1/C Σ_i v_i ℓ_i(W) + ½·λ·‖W‖²,    dΦ/dv_i = −1/C ⟨∇ℓ_i, H⁻¹∇Φ⟩

C is the number of labels, ℓ_i the summed loss of row i, H the Hessian of the head's loss. The head
is at its minimum, so that the influence function (Koh & Liang 2017, arXiv:1703.04730) is the
derivative itself. A training without rows is another minimum, from the one at hand. λ is chosen by
cross-validation on the training rows: the largest one whose loss is within a standard error of the
least (Breiman et al. 1984, §3.4.3). A small λ predicts hardly better, and its head, where it has
more features than rows, turns with each row, so that derivatives say little of leaving rows out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.attribution.evaluation import Evaluation
from hyperopt_peft.attribution.rows import NumberedRows
from hyperopt_peft.attribution.scores import RetrainingSetup
from hyperopt_peft.attribution.trainer import require_trainer
from hyperopt_peft.attribution.trainer_data import TrainerData, shown_columns
from hyperopt_peft.attribution.training import Training
from hyperopt_peft.core.labels import labels_are_shifted, row_losses, weighted_mean
from hyperopt_peft.core.logits import IGNORED
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine.fit import lbfgs
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.features import Features, features_of
from hyperopt_peft.problems.head import Head, L2Penalty, problem_type_of
from hyperopt_peft.trainer.data import collating
from hyperopt_peft.utils.models import base_model
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import perturbed

#: The values of λ to choose from, and the folds of the choice.
PENALTIES, FOLDS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01), 5
#: The largest entry of the gradient at a minimum, in float64: below the share of a single row.
TOLERANCE, STEPS = 1e-7, 2000
#: The same in the choice of λ.
ROUGHLY = 1e-3


class RowWeightedHead(Problem):
    """Σ v_i s_i / Σ c_i over all rows, and the head's prior; s_i and c_i as in `RowWeighted`.

    Args:
        head: the head.
        weights: v, ``(n,)``.
        l2: λ.
    """

    def __init__(self, head: Head, weights: Tensor, l2: float) -> None:
        self.head, self.weights = head, weights
        super().__init__(head.named_parameters(), prior=L2Penalty(head, l2), name="head")

    def loss(self, batch: Features) -> Tensor:
        """The weighted mean over the labels of ``batch``."""
        losses, scored = losses_of_features(self.head, batch)
        return weighted_mean(self.weights[batch.row], losses, scored)


def losses_of_features(head: Head, features: Features) -> tuple[Tensor, Tensor]:
    """`row_losses` of ``features``, of which a token is a row."""
    return row_losses(head, features.batch())


def chosen_l2(head: Head, features: Features, count: int, progress: bool = False) -> float:
    """λ by cross-validation on the ``count`` training rows, see above; ``head`` stays."""
    folds = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % FOLDS
    numbers = [(folds == fold).nonzero()[:, 0] for fold in range(min(FOLDS, count))]
    parts = [
        (features.select((folds != fold).nonzero()[:, 0]), features.select(rows))
        for fold, rows in enumerate(numbers)
    ]
    of_penalties = []
    with perturbed((head.weight, head.bias)):
        for l2 in tqdm(PENALTIES, "head", disable=not progress):
            level, held_out = RowWeightedHead(head, head.weight.new_ones(count), l2), []
            for train, others in parts:  # each from the last minimum
                lbfgs(level, train, tolerance=ROUGHLY)
                with torch.no_grad():
                    held_out.append(losses_of_features(head, others)[0])
            of_penalties.append(torch.cat(held_out))
    losses = torch.stack(of_penalties)
    mean, best = losses.mean(1), losses[int(losses.mean(1).argmin())]
    limit = best.mean() + best.std() / len(best) ** 0.5
    return PENALTIES[int((mean <= limit).nonzero()[0])]


class HeadTraining(Training):
    """The minimum over a head of the weighted loss of ``features``.

    Args:
        head: the head, which is trained.
        features: of all training rows.
        count: n, the number of rows.
        l2: λ.

    Raises:
        NonFiniteError: the loss or a gradient is NaN or infinite.
    """

    def __init__(self, head: Head, features: Features, count: int, l2: float) -> None:
        weights = torch.ones(count, dtype=head.weight.dtype, requires_grad=True)
        self.level, self.features = RowWeightedHead(head, weights, l2), features
        super().__init__(weights, self.level.variables)
        begin = time.perf_counter()
        self._solve(features)
        self.settings |= {"seconds": time.perf_counter() - begin, "l2": l2}
        self.visits += 1
        with torch.no_grad():
            sums, counts = losses_of_features(head, features)
        of_rows = torch.zeros(2, count, dtype=sums.dtype).index_add(
            1, features.row, torch.stack([sums, counts.to(sums)])
        )
        self.losses += of_rows[0] / of_rows[1].clamp(min=1)

    def _solve(self, features: Features) -> None:
        lbfgs(self.level, features, tolerance=TOLERANCE, max_steps=STEPS)

    @contextmanager
    def repeated(self, weights: Tensor) -> Iterator[None]:
        """The minimum with ``weights`` for v."""
        with perturbed((self.weights, *self.variables)):
            with torch.no_grad():
                self.weights.copy_(weights)
            self._solve(self.features)
            yield

    @contextmanager
    def enlarged(self, features: Features) -> Iterator[None]:
        """The minimum on ``features`` too, each with the weight 1."""
        # All weights are 1 here, so that the first row's serves for each.
        like = Features(features.x, features.labels, torch.zeros_like(features.row))
        with perturbed(self.variables):
            self._solve(Features.joined([self.features, like]))
            yield


def setup_from_head(
    trainer: Any, evaluation: Any, slices: str | None, *, progress: bool
) -> tuple[RetrainingSetup, dict[str, Sequence[Any]]]:
    """Train a head on the features of ``trainer``'s rows; return its training, Φ and the columns.

    The trainer, which may have two levels, gives model, rows and collator. Its model stays as it
    is. All else is as in `attribute`.
    """
    require_trainer(trainer)
    data = TrainerData.read(trainer, evaluation, slices)
    _require_labels_of_a_head(trainer.model, data)

    def features(rows: NumberedRows) -> Features:
        found = features_of(
            trainer.model,
            rows.data,
            data.collate,
            batch_size=trainer.args.per_device_eval_batch_size,
            precision=trainer.compute_loss_context_manager,
            progress=progress,
        )
        labels = found.labels.double() if found.labels.is_floating_point() else found.labels
        return Features(found.x.double(), labels, found.row)

    raw = features(data.train_rows)
    train, above = raw.standardized(), features(data.evaluation_rows).standardized(raw)
    head = _head(trainer.model, train)
    count = len(data.train_rows)
    training = HeadTraining(head, train, count, chosen_l2(head, train, count, progress))
    of_slices = {name: above.select(torch.tensor(rows)) for name, rows in data.groups.items()}
    if not all(losses_of_features(head, rows)[1].any() for rows in of_slices.values()):
        raise ProblemError("evaluation: no row has a label; give rows with labels")

    def measure(test: Any) -> Callable[[], Mapping[str, float]]:
        rows = features(data.test_rows(trainer, test)).standardized(raw)
        return partial(_measured, head, rows)

    whole_rows = train.labels.dtype == torch.int64 and len(train.row) == count
    setup = RetrainingSetup(
        training,
        Evaluation(training.weights, {k: partial(_mean, head, x) for k, x in of_slices.items()}),
        {name: len(rows) / len(data.evaluation_rows) for name, rows in data.groups.items()},
        training.level,
        lambda: train,
        measure=measure,
        enlarged=lambda seed: training.enlarged(above),
        probabilities=partial(_probabilities, head, train) if whole_rows else None,
        labels=train.labels if whole_rows else None,
    )
    return setup, shown_columns(data.train)


def _require_labels_of_a_head(model: Any, data: TrainerData) -> None:
    """Raise ProblemError where a label is the next token, or one of another sequence."""
    rows = data.train_rows.data
    with collating("train_dataset"), replay(RandomState.capture()):
        batch = dict(data.collate([rows[0]]))
    batch = send_to_device(batch, next(model.parameters()).device)
    labels = batch.get("labels")
    of_tokens = isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point()
    config = getattr(base_model(model), "config", None)
    text = getattr(config, "is_encoder_decoder", False) or labels_are_shifted(model, batch)
    if of_tokens and text:
        raise ProblemError(
            "model: a head predicts classes, numbers or the tags of tokens, and the labels of "
            f'{type(base_model(model)).__name__} are text; choose model="adapter"'
        )


def _head(model: Any, features: Features) -> Head:
    """The head of 0 for the labels of ``features``."""
    config, labels = getattr(base_model(model), "config", None), features.labels
    outputs = labels.shape[1] if labels.dim() > 1 else 1
    if not labels.is_floating_point():
        outputs = max(int(labels.max()) + 1, getattr(config, "num_labels", 0))
    kind = problem_type_of(config, labels)
    return Head(features.x.shape[1], outputs, problem_type=kind, dtype=features.x.dtype)


def _mean(head: Head, features: Features) -> Tensor:
    """The mean loss over the labels of ``features``."""
    sums, counts = losses_of_features(head, features)
    return sums.sum() / counts.sum()


@torch.no_grad()
def _measured(head: Head, features: Features) -> Mapping[str, float]:
    """The mean loss over the labels of ``features``, and of classes the accuracy."""
    loss, labels = {"loss": float(_mean(head, features))}, features.labels
    if labels.is_floating_point():
        return loss
    right = (head(features.x).logits.argmax(1) == labels)[labels != IGNORED]
    return loss | {"accuracy": float(right.double().mean())}


@torch.no_grad()
def _probabilities(head: Head, features: Features, rows: Sequence[int]) -> Tensor:
    """The class probabilities of ``rows``, ``(n, classes)``."""
    probabilities: Tensor = head(features.x[rows]).logits.softmax(1)
    return probabilities
