"""A linear head on features that are frozen: a convex lower level, solved to its minimum.

    w*(u) = argmin over W, b   f(W, b; u) + ½·λ·‖W‖²,    logits = x·W + b

x are the features of a row, or of a token. f is the loss of any level over the model `Head`, such
as `WeightedRows`. At the minimum the implicit function theorem holds, so that a solver
with exact products gives the hypergradient to its tolerance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from hyperopt_peft.core.labels import labels_are_shifted
from hyperopt_peft.core.logits import MULTI_LABEL, losses_of_logits
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.heads.features import Features
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.models import base_model

#: λ, of features with mean 0 and deviation 1.
L2 = 0.1
#: The column with the number of a row's features, of a model `OnFeatures`.
FEATURES = "features"


class Head(nn.Module):
    """Logits x·W + b and the mean loss of ``labels``, as a model of Transformers returns them.

    Args:
        size: the number of features of a row.
        outputs: the number of classes, or of numbers to predict.
        problem_type: as in the configuration of a Transformers model; it tells several labels a
            row from numbers.
        dtype, device: of W and b, those of the features.

    Example:
        The model of an Engine's lower level, for two sources, one of them with wrong labels:

        >>> from hyperopt_peft import Engine
        >>> from hyperopt_peft.method import TaskLevel, WeightedRows
        >>> x, labels = torch.tensor([[1.0], [-1.0]]).repeat(2, 1), torch.tensor([0, 1, 1, 0])
        >>> below = {"features": x, "labels": labels, "source": torch.tensor([0, 0, 1, 1])}
        >>> above = {"features": x[:2], "labels": labels[:2]}
        >>> head, u = Head(1, 2), torch.zeros(2, requires_grad=True)
        >>> sgd, adam = torch.optim.SGD(head.parameters(), 1.0), torch.optim.Adam([u], 0.5)
        >>> options = {"tags": ["source"], "prior": l2_penalty(), "optimizer": sgd}
        >>> v = lambda batch: 2 * u.softmax(0)[batch["source"]]
        >>> lower = WeightedRows(head, v, data=[below], **options)
        >>> upper = TaskLevel(head, [u], data=[above], optimizer=adam)
        >>> _ = Engine(upper, lower, "cg", lower_steps=5, progress=False).run(5)
        >>> bool(u.softmax(0)[0] > 0.8)
        True
    """

    def __init__(
        self,
        size: int,
        outputs: int,
        *,
        problem_type: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.config = PreTrainedConfig(num_labels=outputs, problem_type=problem_type)
        self.weight = nn.Parameter(torch.zeros(size, outputs, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype, device=device))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """The logits ``(n, C)`` of ``features`` ``(n, d)``; with ``labels`` their mean loss too."""
        # The gradient of a weight that is stored by columns takes a fifth of the time.
        weight = self.weight.T.contiguous().T
        logits, loss = features @ weight + self.bias, None
        if labels is not None:
            losses, scored = losses_of_logits(self, logits, labels, shifted=False)
            loss = losses.sum() / scored.sum().clamp(min=1)
        return SequenceClassifierOutput(loss, logits)


class OnFeatures(nn.Module):
    """A head that reads features by their numbers in ``x``, which equal rows share."""

    def __init__(self, x: Tensor, head: Head) -> None:
        super().__init__()
        self.x, self.head, self.config = x, copy.deepcopy(head), head.config

    def forward(
        self, features: Tensor, labels: Tensor | None = None, output_hidden_states: bool = False
    ) -> Any:
        """Loss and logits; the features are the hidden states of a row of one token."""
        output = self.head(self.x[features], labels)
        if output_hidden_states:
            output.hidden_states = (self.x[features][:, None],)
        return output


def head_of(model: nn.Module, features: Features) -> Head:
    """A head of zeros for the labels of ``features``, made by ``model``."""
    config, labels, x = getattr(base_model(model), "config", None), features.labels, features.x
    outputs = labels.shape[1] if labels.dim() > 1 else 1
    if not labels.is_floating_point():
        outputs = max(int(labels.max()) + 1, getattr(config, "num_labels", 0))
    kind: str | None = getattr(config, "problem_type", None)
    if kind is None and labels.is_floating_point() and outputs > 1:
        kind = MULTI_LABEL  # as Transformers infers from several numbers a row
    return Head(x.shape[1], outputs, problem_type=kind, dtype=x.dtype, device=x.device)


def require_head(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raise ProblemError in several processes, and where labels are text."""
    if (count := distributed.world_size()) > 1:
        raise ProblemError(
            f"world_size: {count} processes would train the same head; start one, without torchrun"
        )
    labels, config = batch.get("labels"), getattr(base_model(model), "config", None)
    of_tokens = isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point()
    encoded = getattr(config, "is_encoder_decoder", False)
    if of_tokens and (encoded or labels_are_shifted(model, batch)):
        raise ProblemError(
            "model: a head predicts classes, numbers or the tags of tokens, and the labels of "
            f'{type(base_model(model)).__name__} are text; choose model="adapter"'
        )


def l2_penalty(l2: float = L2) -> Callable[[Sequence[Tensor]], Tensor]:
    """½·λ·‖W‖², the prior of a level over a `Head`; the bias is free.

    Example:
        >>> head = Head(2, 1)
        >>> l2_penalty(3.0)([head.weight + 1, head.bias])
        tensor(3., grad_fn=...)
    """
    return lambda variables: l2 / 2 * variables[0].square().sum()
