"""BiDoRA: DoRA's magnitudes and directions, learnt on different data as a bilevel program.

    upper: min over m        L(A*, B*, m; D_val)
    lower: A*, B*(m) = argmin over A, B, head   L(A, B, m; D_train) + γ·R(W0 + sBA)

where W' = m ⊙ (W0 + sBA)/‖W0 + sBA‖, one norm an output row, D_train and D_val are parts of
the training set, and R pushes the directions' columns towards orthogonality. Qin et al. 2024,
arXiv:2410.09758.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import get_linear_schedule_with_warmup
from transformers.hf_argparser import HfArg

from hyperopt_peft.adapters import (
    gram_penalty,
    set_norm_grad,
    split_parameters,
    use_fast_dora,
)
from hyperopt_peft.engine import Engine
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.fit import fit
from hyperopt_peft.hypergradients import DARTS, Estimator, get_estimator
from hyperopt_peft.problem import Problem

TaskLoss = Callable[[Any], Tensor]


class Adapter(Problem):
    """One level alone, all trainable parameters: LoRA, or DoRA, the controls.

    Args:
        model: a PeftModel whose forward returns ``.loss``.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(self, model: Any, *, task_loss: TaskLoss | None = None, **level: Any) -> None:
        self.loss = task_loss or own_loss(model)  # type: ignore[method-assign]
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise ProblemError(
                "no parameter of the model is trainable; load the adapter with "
                "PeftModel.from_pretrained(..., is_trainable=True)"
            )
        super().__init__(trained, **level)


class Direction(Problem):
    """Lower level: all A and B, and the task head, on D_train; m is read and never moved.

    Args:
        model: a PeftModel with ``use_dora=True`` whose forward returns ``.loss``.
        gamma: γ, the weight of the Gram regulariser; 0 leaves it out.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(
        self, model: Any, *, gamma: float = 0.0, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        self.model, self.gamma = model, gamma
        self.task_loss = task_loss or own_loss(model)
        parts = split_parameters(model)
        super().__init__([*parts.directions.items(), *parts.rest.items()], **level)

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """L(A, B, m) + γ·R; the two are logged apart."""
        task = self.task_loss(batch)
        if self.gamma == 0:
            return task
        penalty = gram_penalty(self.model)
        return {"loss": task + self.gamma * penalty, "task_loss": task, "gram": penalty}


class Magnitude(Problem):
    """Upper level: all m, on D_val; A, B and head are read.

    Args:
        model: a PeftModel with ``use_dora=True`` whose forward returns ``.loss``.
        decay: the weight of ½‖m − m0‖², m0 being m as it is now; decay towards zero, as an
            optimizer's weight decay would have it, shrinks the pretrained weights themselves.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(
        self, model: Any, *, decay: float = 0.0, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        self.task_loss, self.decay = task_loss or own_loss(model), decay
        super().__init__(split_parameters(model).magnitudes.items(), **level)
        self.start = [m.detach().clone() for m in self.variables]

    def loss(self, batch: Any) -> Tensor:
        """L(A, B, m) + decay·½‖m − m0‖²."""
        task = self.task_loss(batch)
        if self.decay == 0:
            return task
        moved = zip(self.variables, self.start, strict=True)
        return task + self.decay / 2 * sum((m - m0.to(m)).square().sum() for m, m0 in moved)


def own_loss(model: Any) -> TaskLoss:
    """The loss that ``model``'s forward returns for a batch of its arguments."""

    def loss(batch: Any) -> Tensor:
        result: Tensor = model(**batch).loss
        return result

    return loss


@dataclass
class BiDoRAConfig:
    """The settings of search and retraining; every length is in lower optimizer steps."""

    hypergradient: str = HfArg(
        default="darts:sides=1",
        help="hypergradient estimator, with options: cg:steps=5,damping=1.0",
    )
    xi: float | None = HfArg(
        default=None,
        help="ξ of darts, its scale option: the published code has 1, the DARTS formula the "
        "lower learning rate",
    )
    search_steps: int = HfArg(default=120, help="lower steps of the bilevel search")
    lower_steps: int = HfArg(default=2, help="lower steps before each upper step")
    lower_learning_rate: float = HfArg(
        default=2e-3, help="peak learning rate of directions and head"
    )
    upper_learning_rate: float = HfArg(default=1e-3, help="peak learning rate of the magnitudes")
    lower_weight_decay: float = HfArg(
        default=0.0, help="AdamW's weight decay of directions and head"
    )
    magnitude_decay: float = HfArg(default=0.0, help="weight of ½‖m − m0‖² in the upper loss")
    gamma: float = HfArg(
        default=0.0, help="weight of the Gram regulariser; the published recipes have 1e-5"
    )
    upper_fraction: float = HfArg(
        default=0.2, help="share of the training set that the upper level gets"
    )
    warmup_ratio: float = HfArg(default=0.1, help="share of the steps in which learning rates rise")
    max_grad_norm: float | None = HfArg(default=1.0, help="gradient norm limit at each level")
    norm_grad: Literal["full", "detach"] = HfArg(
        default="full", help="whether the row norm is in the graph; detach is PEFT's approximation"
    )
    fast_dora: bool = HfArg(
        default=True, help="whether linear layers run the fast forward pass instead of PEFT's"
    )
    retrain: Literal["none", "warm", "scratch"] = HfArg(
        default="warm",
        help="afterwards, train directions and head with m frozen on the whole training set: not "
        "at all, from where the search ended, or from their initial values",
    )
    retrain_steps: int = HfArg(default=120, help="lower steps of the retraining")
    retrain_learning_rate: float = HfArg(default=2e-3, help="peak learning rate of the retraining")
    seed: int = HfArg(default=0, help="seed of the split and of the upper level's dropout")

    def estimator(self) -> Estimator:
        """The estimator that ``hypergradient`` and ``xi`` name.

        Raises:
            ProblemError: an unknown estimator or option, or ``xi`` for one that has no ξ.
        """
        return with_xi(get_estimator(self.hypergradient), self.xi)

    def __post_init__(self) -> None:
        self.estimator()
        if not 0 < self.upper_fraction < 1:
            raise ProblemError(f"upper_fraction must be in (0, 1), got {self.upper_fraction}")
        if self.retrain not in ("none", "warm", "scratch"):
            raise ProblemError(f'retrain must be "none", "warm" or "scratch", got {self.retrain!r}')
        if not 0 <= self.warmup_ratio <= 1:
            raise ProblemError(f"warmup_ratio must be in [0, 1], got {self.warmup_ratio}")
        if not 1 <= self.lower_steps <= self.search_steps:
            raise ProblemError(
                f"search_steps={self.search_steps} leaves no upper step with "
                f"lower_steps={self.lower_steps}; give at least one lower step for each"
            )


def with_xi(estimator: Estimator, xi: float | None) -> Estimator:
    """``estimator``, with ξ = ``xi`` where that is given.

    Raises:
        ProblemError: ``xi`` is given for an estimator that has no ξ.
    """
    if xi is None:
        return estimator
    if not isinstance(estimator, DARTS):
        raise ProblemError(f"xi is an option of darts, not of {estimator.name}")
    return replace(estimator, scale=xi)


def bidora(
    model: Any,
    *,
    lower_data: Iterable[Any],
    upper_data: Iterable[Any],
    all_data: Iterable[Any] | None = None,
    config: BiDoRAConfig | None = None,
    progress: bool = True,
    callbacks: Iterable[Any] = (),
) -> dict[str, list[dict[str, Any]]]:
    """Search, then retrain if the config says so; ``model`` is trained in place, in train mode.

    Args:
        model: a PeftModel with ``use_dora=True`` whose forward returns ``.loss``; it stays a
            plain PEFT adapter, to save with ``save_pretrained``.
        lower_data, upper_data: batches (mappings that the model's forward takes) of D_train
            and D_val; `~hyperopt_peft.split_dataset` divides a training set.
        all_data: batches of D_train ∪ D_val, for the retraining.
        config: the settings.
        progress: whether to show bars.
        callbacks: given to the search's `Engine`.

    Returns:
        The records of both phases, ``"search"`` (one an upper step) and ``"retrain"`` (one a
        lower step).

    Raises:
        ProblemError: no DoRA adapter, a bad setting, or a retraining without ``all_data``.
    """
    config = config or BiDoRAConfig()
    if config.retrain != "none" and all_data is None:
        raise ProblemError(f'retrain="{config.retrain}" needs all_data')
    (use_fast_dora if config.fast_dora else set_norm_grad)(model, config.norm_grad)
    model.train()  # from_pretrained leaves dropout off
    engine = search(model, lower_data, upper_data, config)
    initial = [w.detach().clone() for w in engine.lower.variables]
    engine.callbacks, engine.progress = list(callbacks), progress
    history = {"search": engine.run(config.search_steps // config.lower_steps), "retrain": []}
    if config.retrain != "none":
        assert all_data is not None
        if config.retrain == "scratch":
            with torch.no_grad():
                for w, w0 in zip(engine.lower.variables, initial, strict=True):
                    w.copy_(w0)
        rate, steps = config.retrain_learning_rate, config.retrain_steps
        lower = direction_level(model, all_data, rate, steps, config)
        history["retrain"] = fit(lower, steps, progress=progress)
    return history


def search(
    model: Any, lower_data: Iterable[Any], upper_data: Iterable[Any], config: BiDoRAConfig
) -> Engine:
    """The Engine of the bilevel phase, ready to ``run``: AdamW and a linear schedule a level."""
    rate = config.lower_learning_rate
    lower = direction_level(model, lower_data, rate, config.search_steps, config)
    magnitudes = split_parameters(model).magnitudes.values()
    upper_steps = config.search_steps // config.lower_steps
    training = _training(magnitudes, config.upper_learning_rate, 0.0, upper_steps, config)
    upper = Magnitude(model, decay=config.magnitude_decay, data=upper_data, **training)
    steps = config.lower_steps
    return Engine(upper, lower, config.estimator(), lower_steps=steps, seed=config.seed)


def direction_level(
    model: Any, data: Iterable[Any], learning_rate: float, steps: int, config: BiDoRAConfig
) -> Direction:
    """The lower level with AdamW and a linear schedule of ``steps`` steps."""
    parts = split_parameters(model)
    owned = [*parts.directions.values(), *parts.rest.values()]
    training = _training(owned, learning_rate, config.lower_weight_decay, steps, config)
    return Direction(model, gamma=config.gamma, data=data, **training)


def _training(
    variables: Iterable[Tensor], rate: float, weight_decay: float, steps: int, config: BiDoRAConfig
) -> dict[str, Any]:
    """AdamW with a linear schedule, and the gradient norm limit, as a Problem takes them."""
    optimizer = AdamW(variables, lr=rate, weight_decay=weight_decay)
    warmup = int(config.warmup_ratio * steps)
    return {
        "optimizer": optimizer,
        "scheduler": get_linear_schedule_with_warmup(optimizer, warmup, steps),
        "max_grad_norm": config.max_grad_norm,
    }
