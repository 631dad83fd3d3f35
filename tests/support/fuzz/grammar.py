"""The grammar of the problems of two levels; a `Form` is a sentence of it."""

import random
from collections.abc import Sequence
from dataclasses import fields, make_dataclass, replace
from typing import Any, ClassVar, Self

ROWS, WIDTH = 6, 3

#: The choices of each field with their odds.
GRAMMAR: dict[str, dict[str, int]] = {
    "first": {"linear": 8, "tied": 2, "attention": 2, "conv": 1, "gru": 1, "embedding": 2},
    "second": {"linear": 6, "tied": 2, "layernorm": 2, "batchnorm": 3, "none": 2, "scale": 1},
    "activation": {"tanh": 3, "softplus": 3, "gelu": 2, "silu": 2},
    "noise": {"none": 5, "torch": 3, "numpy": 3, "python": 3},
    "upper": {"decay": 3, "rows": 4, "shift": 2, "factor": 2, "layer": 3, "labels": 1},
    "task": {"squares": 2, "logistic": 3},
    "call": {"module": 4, "functional": 3, "vmap": 2, "checkpoint": 2, "compiled": 1},
    "precision": {"double": 6, "single": 3, "autocast": 1, "bfloat16": 1, "float16": 1},
    "storage": {"own": 4, "slices": 3, "transposed": 2, "overlap": 1, "stride 0": 1},
    "extra": {"none": 4, "empty": 2, "scalar": 2, "complex": 1, "frozen": 2, "unread": 1},
    "curvature": {"convex": 5, "indefinite": 1},
    "function": {"none": 4, "right": 2, "once": 1, "no second": 1, "weight_norm": 1},
    "meddling": {"none": 6, "scaled": 1, "dropped": 1, "written": 1, "data": 1, "sparse": 1},
    "prior": {"none": 4, "upper": 1, "lower": 1},
    "optimizer": {"sgd": 2, "momentum": 1, "adam": 2},
}


class Sentence:
    """A word for each field of a grammar, and the seed of its numbers.

    At most two of the fields ``odd``, whose other choices may be refused, are not the first choice:
    with many of them nothing would be computed.
    """

    grammar: ClassVar[dict[str, dict[Any, int]]]
    odd: ClassVar[Sequence[str]]

    @classmethod
    def draw(cls, seed: int) -> Self:
        draws = random.Random(seed)
        chosen = {
            name: draws.choices(list(odds), list(odds.values()))[0]
            for name, odds in cls.grammar.items()
        }
        for name in draws.sample(cls.odd, len(cls.odd) - 2):
            chosen[name] = next(iter(cls.grammar[name]))
        return cls(seed, **chosen).possible()

    def possible(self) -> Self:
        """This sentence, without combinations that mean nothing."""
        return self

    def __str__(self) -> str:
        words = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)]
        named = ", ".join(word for word in words if not word.endswith("=none"))
        return f"{type(self).__name__}({named})"


class Form(make_dataclass("Words", ["seed", *GRAMMAR], frozen=True), Sentence):  # type: ignore[misc]
    """A sentence of `GRAMMAR`: a problem of two levels."""

    grammar = GRAMMAR
    odd = ("call", "precision", "storage", "extra", "function", "meddling")

    def possible(self) -> Self:
        """This form, without combinations that PyTorch itself refuses."""
        form = self
        if form.call in ("vmap", "compiled"):  # per row, or without the functions that cannot be
            form = replace(form, first="linear" if form.first in ("gru", "conv") else form.first)
            form = replace(form, function="none", meddling="none")
        if form.call == "vmap":
            form = replace(form, second="tied" if form.second == "batchnorm" else form.second)
            form = replace(form, first="linear" if form.first == "attention" else form.first)
        if form.call == "functional":  # reads other tensors than the module's own
            form = replace(form, function="none")
        if form.meddling == "sparse":
            form = replace(form, first="embedding", call="module", precision="double")
        if form.precision == "float16":  # no such layers on a CPU
            form = replace(form, first="linear", second="none", call="module")
        if form.extra == "complex":
            form = replace(form, storage="own", precision="double", call="module")
        return form

    @property
    def hostile(self) -> bool:
        """Whether autograd itself is wrong or hindered, which `check_problem` tells."""
        meddled = self.meddling not in ("none", "sparse")
        return meddled or self.function in ("no second", "weight_norm")
