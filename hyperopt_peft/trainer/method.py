"""`Method`: what a bilevel method adds to a model and to the losses of its two levels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hyperopt_peft.core.data import DataStream
from hyperopt_peft.core.labels import ADVICE, RowLosses, is_mean_over_labels, logits_of
from hyperopt_peft.core.problem import Problem, TaskLoss
from hyperopt_peft.core.task_level import TaskLevel
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import joined
from hyperopt_peft.trainer.tags import without
from hyperopt_peft.utils.models import trainable
from hyperopt_peft.utils.validation import describe_options, require_types
from hyperopt_peft.utils.vector import widened


class Method:
    """A bilevel method: the upper level's variables, both losses, and the plain model at the end.

    A subclass is a dataclass whose fields are the method's options. It must define
    ``upper_variables`` and may define the rest. A method that defines neither ``upper_variables``
    nor ``upper`` is a baseline: one level on all rows.

    A `BilevelTrainer` calls in this order: ``adapter``, ``rows``, ``read_rows``, ``prepare``, the
    levels, for each upper step ``after_upper_step``, then ``after_search`` and ``finish``, and for
    the second phase ``all_rows``, ``read_rows`` and the lower level again, on the finished model.
    ``export`` comes last, after all phases and before the adapter is saved.

    Example:
        >>> from dataclasses import dataclass
        >>> from functools import partial
        >>> from hyperopt_peft import Engine
        >>> @dataclass
        ... class LearnedDecay(Method):
        ...     start: float = -1.0
        ...     def prepare(self, model):
        ...         self.log_decay = torch.tensor(self.start, requires_grad=True)
        ...     def upper_variables(self, model):
        ...         return {"log_decay": self.log_decay}
        ...     def lower_loss(self, model, batch, task_loss):
        ...         return task_loss(batch) + self.log_decay.exp() * model.weight.square().sum()
        >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
        >>> levels = LearnedDecay().levels(
        ...     model,
        ...     lambda target: (model(x) - target).square().mean(),
        ...     data=([torch.tensor(1.0)], [torch.tensor(1.2)]),
        ...     optimizers=[partial(torch.optim.SGD, lr=0.2)] * 2,
        ... )
        >>> history = Engine(*levels, "cg", lower_steps=5, progress=False).run(400)
        >>> f"{model(x).item():.2f}"  # the decay takes 1.2 to the upper level's 1
        '1.00'
    """

    _argument_group_name = "method"  # in the command line's help

    #: Training arguments by name, used where the user gives none.
    defaults: Mapping[str, Any] = MappingProxyType({})
    #: Those of the paper's code, which replace ``defaults`` where the field ``paper`` is set.
    published_defaults: Mapping[str, Any] = MappingProxyType({})
    #: Columns of numbers that a level reads and the model does not. ``index``, the row's number in
    #: the user's data, needs no column.
    tags: tuple[str, ...] = ()
    #: Whether the losses are the method's own by intent, so that a Trainer's other loss, such as a
    #: ``compute_loss_func``, is left out with a warning and not refused.
    own_loss: bool = False
    #: The user's rule for the losses of rows, which a level gives to `WeightedRows` or calls; None
    #: for the mean over labels. A driver sets it before it makes the levels.
    row_losses: RowLosses | None = None
    #: Whether an upper batch has all upper rows, if they are few, since the upper loss needs them.
    full_upper_batch: bool = False
    #: Whether an ablation may train the variables of both levels in one, by the lower loss alone;
    #: False where this takes the upper ones to an end, such as weights of 0 for all rows.
    one_level: bool = True

    def __init_subclass__(cls, **settings: Any) -> None:
        """Describe the options in the docstring; ProblemError for a name that is close to a hook's.

        A field may have such a name, since it is an option.
        """
        super().__init_subclass__(**settings)
        hooks = [name for name in vars(Method) if not name.startswith("_")]
        public = {name for name in vars(cls) if not name.startswith("_")}
        for name in public - {*hooks} - {*inspect.get_annotations(cls)}:
            words = name.replace("_", "").lower()
            equal = [hook for hook in hooks if hook.replace("_", "") == words]
            if near := equal or get_close_matches(name, hooks, 1, 0.85):
                text = f"is close to the hook {near[0]}, and no hook; rename it"
                raise ProblemError(f"{cls.__name__}.{name}: {text}")
        describe_options(cls)

    def __post_init__(self) -> None:
        """Raise ProblemError if an option does not have its field's type, within its `Bound`s."""
        require_types(self)
        if getattr(self, "paper", None):
            self.defaults = {**self.defaults, **self.published_defaults}

    @property
    def absorbed(self) -> bool:
        """Whether F does not depend on the upper variables once the lower level is solved.

        The hypergradient is then 0, but cheap estimators return another value; a comparison warns.
        """
        return False

    def adapter(self, config: Any) -> Any:
        """The PEFT config ``config`` of a new adapter, changed to what the method needs."""
        return config

    def rows(self, train: Any, upper: Any) -> tuple[Any, Any]:
        """The rows of the lower and the upper level, made from the user's; the two may share rows.

        If the second is None, ``upper_fraction`` of the first become the upper level's.
        """
        return train, upper

    def all_rows(self, train: Any, upper: Any) -> Any:
        """The rows of the second phase, from the results of ``rows``; may read upper variables."""
        if upper is None:
            return train
        return joined(train_dataset=train, upper_dataset=upper)

    def read_rows(self, model: Any, rows: Any, collate: Callable[[Sequence[Any]], Any]) -> None:
        """Read the lower level's prepared rows before training, for example to count labels.

        ``collate`` makes a batch, with tags, from a list of rows. ``model`` is None under FSDP2.
        """

    def prepare(self, model: Any) -> None:
        """Change ``model`` in place before training, for example by a parametrisation."""

    def upper_variables(self, model: Any) -> Mapping[str, Tensor]:
        """The tensors that the upper level learns, by name; parameters of ``model`` or others."""
        return {}

    def lower_loss(self, model: Any, batch: Any, task_loss: TaskLoss) -> Any:
        """f: a scalar, or a dict with ``loss`` and metrics; ``task_loss(batch)`` by default.

        ``batch`` includes the tags. In a Trainer it also has the entries of `core.labels`, by which
        ``task_loss`` weights micro-batches.
        """
        return task_loss(batch)

    def upper_loss(self, model: Any, batch: Any, task_loss: TaskLoss) -> Any:
        """F: as ``lower_loss``."""
        return task_loss(batch)

    def logits_of(self, model: Any, batch: Any) -> Tensor:
        """The logits of ``model`` for a loss of your own, ``(n, C)`` or ``(n, T, C)``.

        The model reads all of ``batch``, such as the attention mask, but labels, tags and a
        Trainer's entries; ProblemError if it cannot. Half precision is widened to float32.

        Example:
            >>> from hyperopt_peft.heads import Head
            >>> batch = {"features": torch.ones(3, 4), "labels": torch.tensor([0, 1, 1])}
            >>> Method().logits_of(Head(4, 2), batch).shape
            torch.Size([3, 2])
        """
        return widened(logits_of(model, batch, self.tags))

    def after_upper_step(self) -> None:
        """Change upper variables in place after each upper step, for example project them."""

    def after_search(self, model: Any) -> None:
        """Change upper variables in place, given the trained lower level.

        With ``retrain="scratch"``, ``finish`` sees the lower level's initial values instead.
        """

    def finish(self, model: Any) -> Any:
        """The plain model after the search, which may be a new one.

        The upper variables are folded in, frozen or dropped. A run that resumes in the second phase
        calls ``finish`` again with the same values of both levels.
        """
        return model

    def export(self, model: Any) -> Any:
        """The model to save, which may be a new one: what is left to fold at the end is folded in.

        Called once, after the last phase; checkpoints have the model before. PEFT must load what
        is saved with equal logits.
        """
        return model

    def lower(self, model: Any, task_loss: TaskLoss) -> Problem:
        """The lower level: ``lower_loss`` over the other trainable parameters of ``model``."""
        variables = trainable(model, without=self.upper_variables(model).values())
        return self._level(self.lower_loss, model, variables, task_loss)

    def upper(self, model: Any, task_loss: TaskLoss) -> Problem:
        """The upper level: ``upper_loss`` over ``upper_variables``."""
        variables = self.upper_variables(model)
        if not variables:
            raise ProblemError(
                f"{type(self).__name__}.upper_variables: returned none of this model; a baseline "
                "has upper_variables = Method.upper_variables"
            )
        return self._level(self.upper_loss, model, variables.items(), task_loss)

    def _level(self, rule: Any, model: Any, variables: Any, task_loss: TaskLoss) -> TaskLevel:
        name = f"{type(self).__name__}.{rule.__name__}"
        loss = lambda batch: rule(model, batch, task_loss)  # noqa: E731
        level = TaskLevel(model, variables, task_loss=loss, name=name)
        rows = "upper_dataset" if rule.__name__.startswith("upper") else "train_dataset"
        level.columns = dict.fromkeys(self.tags, rows)
        return level

    def levels(
        self,
        model: Any,
        task_loss: TaskLoss | None = None,
        *,
        row_losses: RowLosses | None = None,
        data: Sequence[Iterable[Any] | None] = (None, None),
        optimizers: Sequence[Callable[[Sequence[Tensor]], Optimizer]],
    ) -> tuple[Problem, Problem]:
        """Prepare ``model`` and return the levels (upper, lower) for an `Engine`.

        Args:
            model: the model; call ``finish`` and ``export`` after training.
            task_loss: the loss of a batch; by default ``model(**batch).loss`` without tags.
            row_losses: the rule for the losses of rows, where ``task_loss`` is given and the method
                weights rows.
            data: the batches of (upper, lower); see `Problem`.
            optimizers: for (upper, lower), functions from a list of variables to an optimizer.

        Raises:
            ProblemError: as `Problem`; the method is a baseline, or weights rows by another loss
                than ``task_loss``.
        """
        vars(self)["row_losses"] = row_losses
        self.prepare(model)
        of_model = lambda batch: model(**without(batch, self.tags)).loss  # noqa: E731
        lower = self.lower(model, task_loss or of_model)
        if task_loss is not None and lower.examples is not None and row_losses is None:
            raise ProblemError(f"task_loss: {lower.name} reads losses of rows; {ADVICE}")
        task_loss = task_loss or of_model
        levels = self.upper(model, task_loss), lower
        for level, batches, make in zip(levels, data, optimizers, strict=True):
            level.batches = None if batches is None else DataStream(batches, level.name)
            level.optimizer = make(level.variables)
            if level is levels[0]:
                level.optimizer.register_step_post_hook(self.project)
        return levels

    @torch.no_grad()
    def project(self, *_: Any) -> None:
        """Call ``after_upper_step`` without gradients; drivers and optimizers' hooks call this."""
        self.after_upper_step()


def defaults_of(method: Method, rule: RowLosses | None) -> dict[str, Any]:
    """The ``defaults`` of ``method``; without dot products if a rule gives the losses of rows.

    Dot products need losses that read no other row, and those of a rule may.
    """
    defaults = dict(method.defaults)
    if not is_mean_over_labels(rule) and "hypergradient" in defaults:
        name = defaults["hypergradient"]
        defaults["hypergradient"] = name.replace("product=dots", "product=difference")
    return defaults


def has_upper_level(method: Method) -> bool:
    """Whether the class of ``method`` defines an upper level; else it is a baseline."""
    names = ("upper_variables", "upper")
    return any(getattr(type(method), name) is not getattr(Method, name) for name in names)
