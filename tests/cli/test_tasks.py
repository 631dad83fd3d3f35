"""Metrics against closed forms and scikit-learn on what is not ignored."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import EvalPrediction

from hyperopt_peft.cli.text.tasks import TASKS, next_token_losses, token_losses


def test_perplexity_of_uniform_logits_is_the_vocabulary() -> None:
    logits, labels = torch.zeros(2, 4, 7), torch.tensor([[1, 2, 3, -100], [4, -100, -100, -100]])
    losses = token_losses(logits, labels)
    assert losses[:, 1].tolist() == [3, 1]
    metrics = TASKS["seq2seq"].metrics(EvalPrediction(losses.numpy(), labels.numpy()))
    assert metrics["perplexity"] == pytest.approx(7)
    assert metrics["token_loss"] == pytest.approx(math.log(7))


def test_language_loss_weighs_tokens_alike_and_looks_one_ahead() -> None:
    logits = torch.randn(2, 5, 7)
    labels = torch.randint(7, (2, 5))
    labels[1, 3:] = -100
    losses = next_token_losses((logits, "cache"), labels)
    single = [
        -logits[row, at].log_softmax(-1)[labels[row, at + 1]]
        for row, at in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    ]
    metrics = TASKS["causal-lm"].metrics(EvalPrediction(losses.numpy(), labels.numpy()))
    assert metrics["token_loss"] == pytest.approx(float(torch.stack(single).mean()), rel=1e-6)


def test_token_metrics_leave_out_ignored_labels() -> None:
    labels = np.array([[0, 1, -100], [1, 2, -100]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2], [0, 2, 2]])).float()
    task = TASKS["token-classification"]
    predicted = task.reduce(logits, torch.tensor(labels)).numpy()
    metrics = task.metrics(EvalPrediction(predicted, labels))
    assert metrics["accuracy"] == 0.75
    assert metrics["macro_f1"] == f1_score([0, 1, 1, 2], [0, 1, 0, 2], average="macro")
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    # 3 of 4 are right, and the counts are (1, 2, 1) and (2, 1, 1): (3·4 − 5)/(4² − 6)
    assert metrics["matthews"] == pytest.approx(0.7)


def test_correlations_of_a_monotone_map() -> None:
    true = np.array([0.0, 1.0, 2.0, 3.0])
    task = TASKS["regression"]
    metrics = task.metrics(EvalPrediction(np.exp(true), true))
    assert metrics["spearman"] == pytest.approx(1)
    assert 0.5 < metrics["pearson"] < 1
    assert metrics["mse"] == pytest.approx(float(((np.exp(true) - true) ** 2).mean()))
    assert math.isnan(task.metrics(EvalPrediction(np.ones(4), true))["pearson"])
    assert task.reduce(torch.ones(4, 1), torch.ones(4)).shape == (4,)
