"""Combines a bilevel trainer with any `transformers.Trainer` subclass, and their arguments."""

from __future__ import annotations

import copyreg
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import fields, make_dataclass
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any, ClassVar, get_args, get_type_hints

from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.internals import PREPARES

#: The arguments classes of trainers that declare another one in their type hints.
UNHINTED = {"transformers.trainer_seq2seq.Seq2SeqTrainer": Seq2SeqTrainingArguments}


class Combined(type):
    """The metaclass of combined classes, which pickle as the recipe ``made_by``."""

    #: The combining function and its arguments; absent for classes that a module defines.
    made_by: tuple[Callable[..., Any], tuple[Any, ...]]


copyreg.pickle(Combined, lambda cls: vars(cls).get("made_by", cls.__qualname__))


class LowerStep(Trainer):
    """The last class before `Trainer`, so that ``super().training_step`` of a parent ends here."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `BilevelTrainer.lower_step`."""
        return self.lower_step(*args, **kwargs)


@cache
def combined(ours: Any, parent: Any) -> Any:
    """The class with bases (``ours``, ``parent``), cached; ``ours`` if it extends ``parent``."""
    if not (isinstance(parent, type) and issubclass(parent, Trainer)):
        name = getattr(parent, "__name__", repr(parent))
        raise ProblemError(f"bilevel: must be a subclass of transformers.Trainer, got {name}")
    if issubclass(ours, parent):
        return ours
    name = ours.__name__.removesuffix("Trainer") + parent.__name__
    body = {
        "__module__": ours.__module__,
        "__doc__": f"`{ours.__name__}` over `{parent.__name__}`.",
        "made_by": (combined, (ours, parent)),
    }
    return type(ours)(name, (ours, parent, LowerStep), body)


def check_parent(cls: Any, parent: type[Trainer]) -> None:
    """Raise ProblemError for an override of ``cls`` or ``parent`` that does not call super's."""
    for base, name in product(cls.__mro__[: cls.__mro__.index(Trainer)], PREPARES):
        override = inspect.unwrap(vars(base).get(name, check_parent))
        if name in vars(base) and name not in override.__code__.co_names:
            raise ProblemError(
                f"{base.__name__}: overrides {name} without super().{name}; call it; trainers that "
                "generate batches in each step (GRPO, RLOO) are not possible"
            )
    if parent.training_step is not Trainer.training_step and not issubclass(cls, LowerStep):
        raise ProblemError(
            f"{cls.__name__}: {parent.__name__} overrides training_step; derive the class from "
            f"bilevel({parent.__name__})"
        )


def arguments_of(parent: type[Trainer]) -> Any:
    """The class of ``args``, from the first readable type hint, which a body may have too."""
    for base in parent.__mro__:
        if kind := UNHINTED.get(f"{base.__module__}.{base.__qualname__}"):
            return kind
        if annotation := _annotation(base, "args") or inspect.get_annotations(base).get("args"):
            hint = SimpleNamespace(__annotations__={"args": annotation})
            with suppress(NameError):  # the hint's class is imported for type checkers only
                hinted = get_type_hints(hint, vars(sys.modules[base.__module__]))["args"]
                for each in get_args(hinted) or (hinted,):
                    if isinstance(each, type) and issubclass(each, TrainingArguments):
                        return each
    return TrainingArguments


def loads_names(parent: type[Trainer]) -> bool:
    """Whether ``parent`` loads a model by name: the type hint of ``model`` allows ``str``."""
    hints = (_annotation(base, "model") for base in parent.__mro__)
    return bool(re.search(r"\bstr\b", str(next(filter(None, hints), ""))))


def _annotation(base: type, name: str) -> Any:
    """The annotation of ``name`` in an ``__init__`` that ``base`` itself defines, else None."""
    init = vars(base).get("__init__")
    parameter = None if init is None else inspect.signature(init).parameters.get(name)
    if parameter is None or parameter.annotation is parameter.empty:
        return None
    return None if parameter.kind is parameter.VAR_POSITIONAL else parameter.annotation


@cache
def combined_arguments(ours: Any, parents: Any) -> Any:
    """The dataclass with bases (``parents``, ``ours``), cached.

    Defaults are those of ``parents``, except for fields that ``ours`` or one of its bases in this
    package declares.
    """
    if issubclass(ours, parents):
        return ours
    standard = {field.name for field in fields(TrainingArguments)}
    declared = [inspect.get_annotations(base) for base in ours.__mro__ if type(base) is Combined]
    new = [field for field in fields(ours) if any(field.name in names for names in declared)]
    for name in {field.name for field in new} - standard:
        if name in parents.__dataclass_fields__:
            raise ProblemError(
                f"{name}: both {parents.__name__} and {ours.__name__} have this argument; rename it"
            )
    hints = get_type_hints(ours, include_extras=True)
    made = make_dataclass(
        ours.__name__.removesuffix("TrainingArguments") + parents.__name__,
        [(field.name, hints[field.name], copy(field)) for field in new],
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
    """A `transformers.Trainer` that can extend any other; the base of bilevel trainers."""

    #: The class of ``args``.
    Arguments: ClassVar[Any] = TrainingArguments

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_parent(cls, cls.parent())
        if "Arguments" not in vars(cls):
            cls.Arguments = combined_arguments(cls.Arguments, arguments_of(cls.parent()))

    @classmethod
    def parent(cls) -> Any:
        """The class given to `bilevel`, or `transformers.Trainer`."""
        return cls.__mro__[cls.__mro__.index(CombinedTrainer) + 1]
