"""A bilevel trainer before any `transformers.Trainer`: the class of both, and its arguments."""

from __future__ import annotations

import copyreg
import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import fields, make_dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar, Self, get_args, get_type_hints

from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hyperopt_peft.errors import ProblemError

#: Methods that a bilevel step replaces and does not call, with what they would have done.
REPLACED = {
    "_prepare_inputs": "a trainer that generates or changes its batches in each step (GRPO, RLOO)",
    "training_step": "a step of its own; change compute_loss",
}

#: The arguments of a trainer whose type hint is not theirs.
UNHINTED = {"transformers.trainer_seq2seq.Seq2SeqTrainer": Seq2SeqTrainingArguments}


class Combined(type):
    """The class of classes that pickle by their two bases where these were combined."""

    #: The function that combines, and its arguments; absent where a module has the class.
    made_by: tuple[Callable[..., Any], tuple[Any, ...]]


copyreg.pickle(Combined, lambda cls: vars(cls).get("made_by", cls.__qualname__))


@cache
def combined(ours: Any, parent: Any) -> Any:
    """The class (``ours``, ``parent``), always the same; ``ours`` where ``parent`` is its base."""
    if not (isinstance(parent, type) and issubclass(parent, Trainer)):
        name = getattr(parent, "__name__", repr(parent))
        raise ProblemError(f"over: must be a subclass of transformers.Trainer, got {name}")
    if issubclass(ours, parent):
        return ours
    name = ours.__name__.removesuffix("Trainer") + parent.__name__
    body = {
        "__module__": ours.__module__,
        "__doc__": f"`{ours.__name__}` over `{parent.__name__}`.",
        "made_by": (combined, (ours, parent)),
    }
    return type(ours)(name, (ours, parent), body)


def check_parent(parent: type[Trainer]) -> None:
    """Raise ProblemError where a bilevel step would skip what ``parent`` does in a step."""
    for name, what in REPLACED.items():
        method = getattr(parent, name)
        # TRL's own training_step only opens a context, for activation_offloading.
        known = name == "training_step" and method.__module__.startswith("trl.")
        if method is not getattr(Trainer, name) and not known:
            raise ProblemError(
                f"{parent.__name__}: has {name} of its own, which a bilevel step does not call: "
                f"{what}"
            )


def arguments_of(parent: type[Trainer]) -> Any:
    """The class of ``args`` by the first type hint of one that can be read."""
    for base in parent.__mro__:
        if kind := UNHINTED.get(f"{base.__module__}.{base.__qualname__}"):
            return kind
        if annotation := _annotation(base, "args"):
            hint = SimpleNamespace(__annotations__={"args": annotation})
            with suppress(NameError):  # imported for a type checker alone
                hinted = get_type_hints(hint, vars(base)["__init__"].__globals__)["args"]
                for each in get_args(hinted) or (hinted,):
                    if isinstance(each, type) and issubclass(each, TrainingArguments):
                        return each
    return TrainingArguments


def loads_names(parent: type[Trainer]) -> bool:
    """Whether ``parent`` loads a model by its name, by the type hint of ``model``."""
    hints = (_annotation(base, "model") for base in parent.__mro__)
    return bool(re.search(r"\bstr\b", str(next(filter(None, hints), ""))))


def _annotation(base: type, name: str) -> Any:
    """The annotation of the argument ``name`` where ``base`` defines ``__init__`` with it."""
    init = vars(base).get("__init__")
    parameter = None if init is None else inspect.signature(init).parameters.get(name)
    if parameter is None or parameter.annotation is parameter.empty:
        return None
    return None if parameter.kind is parameter.VAR_POSITIONAL else parameter.annotation


@cache
def combined_arguments(ours: Any, parents: Any) -> Any:
    """The dataclass (``parents``, ``ours``), always the same.

    ``parents`` decides the defaults, except of the fields that ``ours`` or one of its bases in this
    package declares.
    """
    if issubclass(ours, parents):
        return ours
    standard = {field.name for field in fields(TrainingArguments)}
    declared = [inspect.get_annotations(base) for base in ours.__mro__ if type(base) is Combined]
    own = [field for field in fields(ours) if any(field.name in names for names in declared)]
    for name in {field.name for field in own} - standard:
        if name in parents.__dataclass_fields__:
            raise ProblemError(
                f"{name}: an argument of both {parents.__name__} and {ours.__name__}"
            )
    hints = get_type_hints(ours)
    made = make_dataclass(
        ours.__name__.removesuffix("TrainingArguments") + parents.__name__,
        [(field.name, hints[field.name], copy(field)) for field in own],
        bases=(parents, ours),
        namespace={
            "__doc__": f"`{ours.__name__}` with the arguments of `{parents.__name__}`.",
            "made_by": (combined_arguments, (ours, parents)),
            "parents": parents,
        },
    )
    made.__module__ = ours.__module__
    return made


class CombinedTrainer(Trainer, metaclass=Combined):
    """A `transformers.Trainer` that can stand before any other; the base of bilevel trainers."""

    #: The class of ``args``.
    Arguments: ClassVar[Any] = TrainingArguments

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_parent(cls.parent())
        if "Arguments" not in vars(cls):
            cls.Arguments = combined_arguments(cls.Arguments, arguments_of(cls.parent()))

    @classmethod
    def over(cls, trainer: Any) -> type[Self]:
        """This class before ``trainer``, another subclass of `transformers.Trainer`.

        The class has the bases (cls, ``trainer``) and is always the same object. Both levels train
        by the loss of ``trainer`` and on data that ``trainer`` prepares. The arguments are
        ``Arguments``, those of ``trainer`` with its defaults, and those of this class.

        Raises:
            ProblemError: ``trainer`` is no trainer, or does more in a step than evaluate its loss.

        Example:
            >>> from hyperopt_peft import BilevelTrainer
            >>> class Halved(Trainer):
            ...     def compute_loss(self, model, inputs, *args, **kwargs):
            ...         return super().compute_loss(model, inputs, *args, **kwargs) / 2
            >>> BilevelTrainer.over(Halved)
            <class 'hyperopt_peft.trainer.trainer.BilevelHalved'>
        """
        made: type[Self] = combined(cls, trainer)
        return made

    @classmethod
    def parent(cls) -> Any:
        """The class that `over` was given; else `transformers.Trainer`."""
        return cls.__mro__[cls.__mro__.index(CombinedTrainer) + 1]
