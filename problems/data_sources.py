"""Weights of data sources, learned on trusted examples of a target task.

    upper: min over u   L(w*(u); trusted examples)      `HeldOut`
    lower: w*(u) = argmin over the adapter w   1/N Σ_i v_k(i)(u) ℓ_i(w)

Source k has n_k of the N examples. The weight of each of its examples is

    v_k = a_k s_k N / Σ_j a_j s_j n_j      a = σ(u) or softmax(u),   s_k = 1 or 1/n_k

so that the mean weight is 1: the weights cannot act as a learning rate. With s_k = 1/n_k and a
softmax the lower loss is Σ_k a_k L_k, L_k the mean loss of source k: Pan et al. 2024 (ScaleBiO),
arXiv:2406.19976.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hyperopt_peft.core.examples import WeightedExamples
from hyperopt_peft.core.labels import WEIGHT, label_losses, labels_are_shifted, scored_labels
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.common import Adapter
from hyperopt_peft.problems.example_weights import COLUMNS, column, example_losses, without

#: The column with the number of an example's source.
SOURCE = "source"


class SourceWeights(nn.Module):
    """v, the weight of an example of each source; initially u = 0, where all weights are equal.

    Args:
        counts: by name, the number n_k of examples of each source.
        kind: a = σ(u), where a source can be switched off alone, or a softmax.
        average: ``"rows"`` (s_k = 1) counts each example alike, ``"sources"`` (1/n_k) each source.

    Raises:
        ProblemError: there are fewer than two sources, or one without examples.

    Example:
        >>> weights = SourceWeights({"wiki": 30, "code": 10}, average="sources")
        >>> weights().tolist(), weights.shares().tolist()
        ([0.666..., 2.0], [0.5, 0.5])
    """

    counts: Tensor

    def __init__(
        self,
        counts: Mapping[str, int],
        *,
        kind: Literal["sigmoid", "softmax"] = "sigmoid",
        average: Literal["rows", "sources"] = "rows",
    ) -> None:
        super().__init__()
        if not isinstance(counts, Mapping) or len(counts) < 2:
            raise ProblemError(
                f"counts: must map the names of two or more sources to their numbers of examples, "
                f"got {counts!r}"
            )
        if empty := [name for name, count in counts.items() if count < 1]:
            raise ProblemError(f"source {empty[0]!r}: has no examples; give some, or leave it out")
        self.names, self.kind, self.average = list(counts), kind, average
        self.logits = nn.Parameter(torch.zeros(len(counts)))
        numbers = [float(count) for count in counts.values()]
        self.register_buffer("counts", torch.tensor(numbers), persistent=False)

    def forward(self) -> Tensor:
        """v, ``(K,)``; the mean over all examples is 1."""
        return self.shares() * self.counts.sum() / self.counts

    def shares(self) -> Tensor:
        """p_k, the share of source k in the lower loss, ``(K,)``; the sum is 1."""
        a = self.logits.sigmoid() if self.kind == "sigmoid" else self.logits.softmax(0)
        mass = a * self.counts if self.average == "rows" else a
        return mass / mass.sum()


def default_prior(logits: int, trusted: int) -> float:
    """τ = K/(8·n) for K ``logits`` and n ``trusted`` rows: a prior variance of 8 a logit.

    exp(−n·(F + prior)), with F the mean loss of the trusted rows, is then a posterior.

    Example:
        >>> default_prior(4, 50)
        0.01
    """
    return logits / (8 * trusted)


class Mixture(WeightedExamples, Adapter):
    """Lower level: min over the trainable parameters w of the mean of v_k(i) ℓ_i(w).

    The column ``source`` of a batch has the source of each row ``(n,)``, a number from 0 in the
    order of ``weights.names``. Of the shape of ``labels``, ``(n, T)``, it has the source of each
    token, and the mean is over all labels: the loss of a language model where each weight is 1.

    Args:
        model: a Transformers model with an adapter, for classification or language modelling.
        weights: the weights v.
        level: as in `TaskLevel`.

    Raises:
        ProblemError: no parameter of the model is trainable; or as `Problem`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = get_peft_model(BertForSequenceClassification(tiny), LoraConfig())
        >>> lower = Mixture(model, SourceWeights({"wiki": 1, "code": 1}))
        >>> ids, labels = torch.ones(2, 4, dtype=torch.int64), torch.tensor([0, 1])
        >>> sorted(lower.loss({"input_ids": ids, "labels": labels, "source": labels}))
        ['loss', 'share_code', 'share_wiki', 'task_loss']
    """

    def __init__(self, model: Any, weights: SourceWeights, **level: Any) -> None:
        self.weights = weights
        super().__init__(model, **level)

    def groups(self, batch: Any) -> Tensor:
        """The source of each row, or label."""
        return column(batch, SOURCE, len(self.weights.names), SOURCE)

    def losses(self, batch: Any) -> Tensor:
        """The summed loss of each source's rows, or labels."""
        count = len(self.weights.names)
        if (source := self.groups(batch)).dim() == 1:
            losses = example_losses(self.model, batch)
        else:
            losses, _ = label_losses(self.model, without(batch, COLUMNS))
        return losses.new_zeros(count).index_add(0, source.flatten(), losses.flatten())

    def weighted(self, losses: Tensor, batch: Any) -> dict[str, Tensor]:
        """The weighted mean; the plain mean and each share p_k are metrics."""
        number = self._number(batch)
        shares = zip(self.weights.names, self.weights.shares().detach(), strict=True)
        return {
            "loss": (self.weights().to(losses) * losses).sum() / number,
            "task_loss": losses.detach().sum() / number,
            **{f"share_{name}": share for name, share in shares},
        }

    def _number(self, batch: Any) -> Any:
        """N, of the rows or labels; in a Trainer the mean of a step's micro-batches."""
        source, labels = batch[SOURCE], batch.get("labels")
        if labels is None or source.shape != labels.shape:
            return len(source)
        number = scored_labels(batch, labels_are_shifted(self.model, without(batch, COLUMNS)))
        assert number is not None
        return number.clamp(min=1) / batch.get(WEIGHT, 1)
