"""What programs that weight training examples share: losses one by one, and the upper level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError

#: Columns that tell a lower level which weight an example has; no model takes them.
COLUMNS = ("index", "source")


class HeldOut(Problem):
    """Upper level: the parameters of ``weights``, judged by the model's loss on held-out data.

    Args:
        weights: the module whose parameters the level owns.
        model: a model whose forward returns ``.loss``; it is read and never moved.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(self, weights: nn.Module, model: Any, **level: Any) -> None:
        self.model = model
        super().__init__(weights.named_parameters(), **level)

    def loss(self, batch: Any) -> Tensor:
        """The model's own loss."""
        require_labels(batch)
        result: Tensor = self.model(**without(batch, COLUMNS)).loss
        return result


def example_losses(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The cross entropy of each example, ``(n,)``: of a model of classes, of tokens or of text.

    Transformers' models return a batch's mean alone. The loss of an example with a label for each
    token is the mean over these. As in the models' own losses, the labels of a causal language
    model are those of the next token (pad on the right: a first token that follows padding is
    scored too), and -100 is left out; an example of nothing else has loss 0.

    Args:
        model: a Transformers model, with or without a PEFT adapter.
        batch: its arguments and ``labels``, whole numbers; a sequence-to-sequence model needs
            ``decoder_input_ids`` too, which ``DataCollatorForSeq2Seq(tokenizer, model)`` adds.

    Raises:
        ProblemError: no labels, or labels that are not classes.
    """
    labels = require_labels(batch)
    logits = model(**without(batch, ("labels", *COLUMNS))).logits
    if labels.is_floating_point() or labels.dim() != logits.dim() - 1:
        raise ProblemError(
            f"labels must be one class an example or token, whole numbers; they are {labels.dtype} "
            f"of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}"
        )
    if labels.dim() > 1:  # a trained prompt comes before the tokens
        labels = pad(labels, (logits.shape[1] - labels.shape[1], 0), value=-100)
    if _is_causal(model):
        labels = pad(labels, (0, 1), value=-100)[:, 1:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    if labels.dim() == 1:
        return each
    return each.view_as(labels).sum(1) / (labels != -100).sum(1).clamp(min=1)


def column(batch: Any, name: str, count: int, what: str) -> Tensor:
    """``batch[name]``, ``(n,)``: whole numbers from 0 that are less than ``count``.

    Raises:
        ProblemError: there is no such column, or it holds something else.
    """
    if name not in batch:
        raise ProblemError(
            f"the batch has no column {name!r}, the number of each example's {what}, only "
            f"{sorted(batch)}; add it to the training set, and keep it with "
            "remove_unused_columns=False where the Trainer makes the batches"
        )
    values = batch[name]
    if not isinstance(values, Tensor) or values.dim() != 1 or values.dtype != torch.int64:
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ProblemError(f"column {name!r} must hold one whole number an example, got {kind}")
    low, high = (int(x) for x in values.aminmax())
    if low < 0 or high >= count:
        raise ProblemError(
            f"column {name!r} has {low if low < 0 else high}, but there is no such {what}: "
            f"there are {count}, numbered from 0"
        )
    return values


def require_labels(batch: Any) -> Tensor:
    """``batch["labels"]``; raises ProblemError where there are none."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ProblemError(f"the batch must have labels, a tensor; it has {found}")
    labels: Tensor = batch["labels"]
    return labels


def without(batch: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """``batch`` without the entries ``names``."""
    return {key: value for key, value in batch.items() if key not in names}


def _is_causal(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
