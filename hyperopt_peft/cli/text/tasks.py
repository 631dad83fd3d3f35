"""The tasks: the model class and the evaluation metrics of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    EvalPrediction,
)

from hyperopt_peft.core.logits import IGNORED

TaskName = Literal[
    "text-classification", "regression", "token-classification", "causal-lm", "seq2seq", "sft"
]
SFT = "sft"  # by TRL
#: The logits of a batch, of some models with further outputs.
Logits = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """One task: the Auto class of the models, PEFT's name for it, and the metrics.

    Attributes:
        metric: the number by which methods are compared.
        reduce: maps the logits and labels of a batch to the predictions for ``metrics``.
        metrics: maps all predictions and labels to named numbers; None for those of TRL.
    """

    model: Any
    peft: str
    metric: str
    reduce: Callable[[Any, Tensor], Tensor] | None = None
    metrics: Callable[[Any], dict[str, float]] | None = None
    classes: bool = False


def argmax(logits: Logits, labels: Tensor) -> Tensor:
    """The class of the largest logit, from shape (…, classes) to (…)."""
    return _first(logits).argmax(-1)


def prediction(logits: Logits, labels: Tensor) -> Tensor:
    """The predicted number, from shape (examples, 1) to (examples,)."""
    return _first(logits).squeeze(-1)


def next_token_losses(logits: Logits, labels: Tensor) -> Tensor:
    """`token_losses` of logits that predict the next token."""
    return token_losses(_first(logits)[:, :-1], labels[:, 1:])


def token_losses(logits: Logits, labels: Tensor) -> Tensor:
    """The sum of the negative log-likelihoods and the number of tokens, of shape (examples, 2)."""
    scores = _first(logits).float()
    losses = cross_entropy(scores.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.sum(1), (labels != IGNORED).sum(1).to(losses)], 1)


def _first(logits: Logits) -> Tensor:
    """The logits, without the further outputs of some models."""
    return logits[0] if isinstance(logits, tuple) else logits


def classification_metrics(result: EvalPrediction) -> dict[str, float]:
    """Accuracy, macro-F1 and Matthews' correlation over all labels that are not ignored."""
    labelled = result.label_ids != IGNORED
    true, predicted = result.label_ids[labelled], result.predictions[labelled]
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0.0)),
        "matthews": float(matthews_corrcoef(true, predicted)),
    }


def regression_metrics(result: EvalPrediction) -> dict[str, float]:
    """Mean squared error, Pearson's and Spearman's correlation (NaN for constant values)."""
    true, predicted = result.label_ids, result.predictions
    varied = min(np.ptp(true), np.ptp(predicted)) > 0
    return {
        "mse": float(mean_squared_error(true, predicted)),
        "pearson": float(pearsonr(true, predicted).statistic) if varied else float("nan"),
        "spearman": float(spearmanr(true, predicted).statistic) if varied else float("nan"),
    }


def language_metrics(result: EvalPrediction) -> dict[str, float]:
    """The mean loss over all tokens and its exponential, the perplexity."""
    total, tokens = result.predictions.sum(0)
    return {"token_loss": float(total / tokens), "perplexity": float(np.exp(total / tokens))}


SEQUENCES = AutoModelForSequenceClassification, "SEQ_CLS"
TOKENS = AutoModelForTokenClassification, "TOKEN_CLS"
CAUSAL = AutoModelForCausalLM, "CAUSAL_LM"
PAIRS = AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"

TASKS: dict[str, Task] = {
    "text-classification": Task(*SEQUENCES, "accuracy", argmax, classification_metrics, True),
    "regression": Task(*SEQUENCES, "mse", prediction, regression_metrics),
    "token-classification": Task(*TOKENS, "macro_f1", argmax, classification_metrics, True),
    "causal-lm": Task(*CAUSAL, "perplexity", next_token_losses, language_metrics),
    "seq2seq": Task(*PAIRS, "perplexity", token_losses, language_metrics),
    SFT: Task(*CAUSAL, "loss"),
}
