"""The ways to train of `cells`: each makes a model of a task, by a learner and its settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.mix.learners import Learner
from benchmarks.mix.tasks import Task
from hyperopt_peft import HypergradientWarning, hypergradient
from hyperopt_peft.problems.compare_baselines import split_folds
from hyperopt_peft.problems.data_sources import NO_VOTE, SourceWeights
from hyperopt_peft.problems.example_weights import HeldOut


@dataclass(frozen=True)
class Trained:
    """A model, and the weights of the sources and, last, of the trusted rows, if it has any."""

    model: Any
    weights: SourceWeights | None = None


#: A way to train, with the settings of a learner.
Method = Callable[[Learner, Task], Trained]


@dataclass(frozen=True)
class Recipe:
    """How weights are learned.

    Attributes:
        prior: τ of the upper level's prior ½·τ·mean‖u − u0‖²; with None K/(8·n) for K logits and n
            trusted rows, by which F + prior is a log posterior with a variance of 8 a logit.
        rate: of Adam at the upper level.
        steps: of the upper level.
    """

    prior: float | None = 0.3
    rate: float = 0.6
    steps: int = 12

    def tau(self, task: Task) -> float:
        """τ for a task."""
        if self.prior is not None:
            return self.prior
        return (task.votes.shape[1] + 1) / (8 * len(task.trusted))


def below(task: Task, trusted: Tensor, repeat: int) -> tuple[Tensor, Tensor]:
    """The rows of the sources and the trusted ones, and their votes, the trusted rows' last."""
    last = task.votes.shape[1]
    rows = torch.cat([task.train, trusted.repeat(repeat)])
    votes = torch.full((len(rows), last + 1), NO_VOTE)
    votes[: len(task.train), :last] = task.votes[task.train]
    votes[len(task.train) :, last] = task.votes_of(trusted).repeat(repeat)
    return rows, votes


def source_weights(votes: Tensor, a: Tensor | None = None) -> SourceWeights:
    """The weights of ``votes``, ``(n, K)``, with σ(u) = ``a``, equal without."""
    counts = (votes != NO_VOTE).sum(0).clamp(min=1)
    weights = SourceWeights({str(k): int(n) for k, n in enumerate(counts)})
    if a is not None:
        weights.logits.data = a.clamp(1e-3, 1 - 1e-3).logit()
    return weights


def trusted_only(learner: Learner, task: Task) -> Trained:
    """The trusted rows alone."""
    model = learner.model(task)
    votes = task.votes_of(task.trusted)[:, None]
    learner.train(learner.level(task, model, task.trusted, votes, None))
    return Trained(model)


def mixed(learner: Learner, task: Task, weights: SourceWeights | None = None) -> Trained:
    """Sources and trusted rows with fixed weights, by default equal ones."""
    rows, votes = below(task, task.trusted, learner.repeat)
    weights = source_weights(votes) if weights is None else weights
    weights.requires_grad_(False)
    model = learner.model(task)
    learner.train(learner.level(task, model, rows, votes, weights))
    return Trained(model, weights)


def continued(learner: Learner, task: Task) -> Trained:
    """Sources and trusted rows, then the trusted rows alone."""
    trained = mixed(learner, task)
    votes = task.votes_of(task.trusted)[:, None]
    level = learner.level(task, trained.model, task.trusted, votes, None, after=True)
    learner.train(level, after=True)
    return trained


def agreement(learner: Learner, task: Task) -> Tensor:
    """The agreement of each source with a model of the trusted rows, ``(K,)``."""
    return learner.agreement(task, trusted_only(learner, task).model)


def by_accuracy(learner: Learner, task: Task) -> Trained:
    """Weights that are the agreement with a model of the trusted rows."""
    return _weighed(learner, task, agreement(learner, task))


def by_log_odds(learner: Learner, task: Task) -> Trained:
    """Weights that are the log odds of a right vote, as in naive Bayes; those below 0 are 0."""
    share = agreement(learner, task)
    odds = (share / (1 - share) * (task.classes - 1)).log().clamp(min=0)
    return _weighed(learner, task, odds / odds.max().clamp(min=1e-6))


def _weighed(learner: Learner, task: Task, a: Tensor) -> Trained:
    _, votes = below(task, task.trusted, learner.repeat)
    return mixed(learner, task, source_weights(votes, torch.cat([a, torch.ones(1)])))


def filtered(learner: Learner, task: Task) -> Trained:
    """Sources without the votes that a model of the trusted rows does not give, and trusted."""
    votes = task.votes.clone()
    agreed = votes[task.train]
    agreed[~learner.agrees(task, trusted_only(learner, task).model)] = NO_VOTE
    votes[task.train] = agreed
    rows = task.train[(agreed != NO_VOTE).any(1)]
    used = (agreed != NO_VOTE).any(0)
    return mixed(learner, replace(task, train=rows, votes=votes[:, used]))


def learnt(learner: Learner, task: Task, recipe: Recipe) -> Trained:
    """Weights learned on the trusted rows, then a training on everything."""
    rows, votes = below(task, task.trusted, learner.repeat)
    weights, model = source_weights(votes), learner.model(task)
    optimizer = torch.optim.Adam([weights.logits], lr=recipe.rate, betas=(0.9, 0.99))
    above = {"data": [learner.batch(task, task.trusted)], "optimizer": optimizer}
    upper = HeldOut(model, weights, prior=recipe.tau(task), **above)
    lower = learner.level(task, model, rows, votes, weights, search=True)
    for _ in range(recipe.steps):
        learner.advance(lower)
        with warnings.catch_warnings(action="ignore", category=HypergradientWarning):
            slope = hypergradient(upper, lower, learner.hypergradient)
        upper.step(slope)
        learner.count_products(len(task.trusted))
    return mixed(learner, task, weights)


def searched(learner: Learner, task: Task, recipe: Recipe, passes: float, seed: int) -> Trained:
    """Weights by Optuna's TPE for the same upper objective, until ``passes`` are spent.

    The first trial is of equal weights. The best one is trained again, as a learnt mix is.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
    study = optuna.create_study(sampler=sampler)
    rows, votes = below(task, task.trusted, learner.repeat)
    weights = source_weights(votes).requires_grad_(False)
    names = [f"u{k}" for k in range(votes.shape[1])]
    study.enqueue_trial(dict.fromkeys(names, 0.0))
    batch, end = learner.batch(task, task.trusted), learner.passes.count + passes
    level = None
    while learner.passes.count < end:
        trial = study.ask()
        logits = torch.tensor([trial.suggest_float(name, -4.0, 4.0) for name in names])
        weights.logits.data = logits
        if level is None or not learner.warm:
            level = learner.level(task, learner.model(task), rows, votes, weights)
        learner.train(level)
        with torch.no_grad():
            loss = float(level.model(**batch).loss)
        study.tell(trial, loss + recipe.tau(task) / 2 * float(logits.square().mean()))
    weights.logits.data = torch.tensor([study.best_params[name] for name in names])
    return mixed(learner, task, weights)


def held_out(method: Method, learner: Learner, task: Task, folds: int) -> Tensor:
    """The loss of each trusted row by the model that was trained without its fold, ``(n,)``."""
    fold = torch.tensor(split_folds(task.votes_of(task.trusted).tolist(), folds, seed=1))
    losses = torch.zeros(len(fold))
    for k in range(folds):
        model = method(learner, replace(task, trusted=task.trusted[fold != k])).model
        losses[fold == k] = learner.outcome(task, model, task.trusted[fold == k])[0]
    return losses
