"""What a value contains, as JSON: the same for equal copies and in every process."""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
import json
import weakref
from collections import ChainMap, OrderedDict
from collections.abc import Mapping, MutableMapping
from enum import Enum
from pathlib import PurePath
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
import pandas  # type: ignore[import-untyped]
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import PushToHubMixin

from hyperopt_peft.trainer.code import files_of, is_installed, is_of_user, name_of, parts_of
from hyperopt_peft.trainer.fingerprint import data_fingerprint, sample

#: The characters above which the hash of a part's description stands for it.
LONG = 1000
#: The entries above which a parameter of a model that is not read whole is sampled.
MANY = 2**20
#: What a model, a configuration or a tokenizer says of its origin and of warnings.
UNREAD = {"name_or_path", "_name_or_path", "deprecation_warnings", "warnings_issued"}


class NoContentsError(TypeError):
    """A value, such as a lock or an open file, has no contents to compare."""


def contents_of(value: Any, place: str = "", *, whole: bool = True) -> Any:
    """What ``value`` contains, as JSON.

    Of an object this is what pickle would store; of the user's functions and classes also their
    code, the variables around them, and the globals that they read. The orders of a dict and of a
    set do not count. The hash of a part's description stands for it where it is long.

    Args:
        value: anything.
        place: how an error names ``value``.
        whole: whether large parameters are read whole; else at evenly spaced entries.

    Raises:
        NoContentsError: a part of ``value`` has no contents; the message begins with its place.

    Example:
        >>> contents_of({"rate": 0.1, "names": {"b", "a"}, "count": len})
        {'count': 'builtins.len', 'names': ['a', 'b'], 'rate': 0.1}
        >>> before = contents_of(weights := torch.ones(2000))
        >>> weights[7] += 1e-5
        >>> contents_of(weights) == before
        False
    """
    return _Reader(place, whole).read(value, "")


def _hash(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class _Reader:
    """Describes each value once: a cycle ends at the place of the first visit."""

    def __init__(self, root: str, whole: bool) -> None:
        self.root, self.whole = root, whole
        #: By id, a value, which so stays alive, and its description.
        self.known: MutableMapping[int, tuple[Any, Any]] = {}

    def read(self, value: Any, place: str) -> Any:
        """The description of ``value``, which is at ``place`` below the root."""
        if value is None or type(value) in (bool, int, float):
            return value
        if id(value) in self.known:
            return self.known[id(value)][1]
        self.known[id(value)] = value, f"as {place}"
        try:
            found = self._described(value, place)
            if place and len(text := json.dumps(found)) > LONG:
                found = f"sha256 {_hash(text.encode())}"
        except NoContentsError:
            raise
        except Exception as error:  # whatever a library or a user's __reduce__ raises
            name, kind = f"{self.root}{place}".lstrip("."), type(value).__name__
            raise NoContentsError(f"{name}: a {kind} has no contents to compare") from error
        self.known[id(value)] = value, found
        return found

    def _described(self, value: Any, place: str) -> Any:
        kind = type(value)
        if kind is str or isinstance(value, PurePath):
            return str(value)
        if kind in (bytes, bytearray):
            return f"bytes {_hash(value)}"
        if kind in (list, tuple):
            return [self.read(each, f"{place}[{n}]") for n, each in enumerate(value)]
        if kind in (dict, MappingProxyType):
            return self._entries(value, place)
        if isinstance(value, set | frozenset):
            return self._unordered(value, place)
        if isinstance(value, Enum):  # one that is a text or a number equals it
            plain = isinstance(value, str | int)
            return value.value if plain else [self.read(kind, place), value.name]
        if isinstance(value, np.generic) or kind is np.ndarray:
            data = value.tolist() if value.dtype.hasobject else value.tobytes()
            return [str(value.dtype), list(value.shape), self.read(data, f"{place}[:]")]
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if isinstance(value, pandas.DataFrame):
            columns = [(each.dtype, each.to_numpy()) for _, each in value.items()]
            return self.read([value.index, value.columns, columns], f"{place}[:]")
        if isinstance(value, pandas.Series | pandas.Index):
            index = value.index if isinstance(value, pandas.Series) else list(value.names)
            return self.read([index, value.name, value.dtype, value.to_numpy()], f"{place}[:]")
        if isinstance(value, Dataset):
            return [str(value.features), data_fingerprint(value, most=max(1, len(value)))]
        if isinstance(value, ModuleType):
            return files_of(value)
        if isinstance(value, CodeType):
            constants = [self.read(each, place) for each in value.co_consts]
            return [_hash(value.co_code), [*value.co_names], [*value.co_varnames], constants]
        if isinstance(value, FunctionType | type) and is_installed(value):
            return name_of(value)
        parts = parts_of(value) if isinstance(value, FunctionType | type) else _parts_of(value)
        return parts if isinstance(parts, str) else self._entries(parts, place)

    def _entries(self, value: Mapping[Any, Any], place: str) -> Any:
        if all(type(key) is str for key in value):
            return {key: self.read(value[key], f"{place}.{key}") for key in sorted(value)}
        pairs = [[self.read(k, place), self.read(x, f"{place}[{k!r}]")] for k, x in value.items()]
        return sorted(pairs, key=json.dumps)

    def _unordered(self, value: Any, place: str) -> Any:
        before, found = self.known, []
        for each in value:  # as if it were the first
            self.known = ChainMap({}, before)
            found.append(self.read(each, place + "{}"))
        self.known = before
        return sorted(found, key=json.dumps)

    def _tensor(self, value: Tensor, place: str) -> Any:
        large = isinstance(value, nn.Parameter) and value.numel() > MANY
        read = (
            sample(value) if value.is_meta or (large and not self.whole) else value.detach().cpu()
        )
        flat = read.resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)
        found = [str(value.dtype), list(value.shape), value.requires_grad, _hash(flat.numpy())]
        of_library = type(value) not in (Tensor, nn.Parameter)  # such as a quantised one
        return [*found, self._entries(vars(value), place)] if of_library else found


def _parts_of(value: Any) -> dict[str, Any] | str:
    """The class, the attributes and other contents of an object; or its name, where it has one.

    Words of Python's, which no attribute has, name what is no attribute.
    """
    kind = type(value)
    if isinstance(value, MethodType):
        return {"def": value.__func__, "in": value.__self__}
    if isinstance(value, staticmethod | classmethod | property | functools.cached_property):
        return {x: getattr(value, x, None) for x in ("__func__", "fget", "fset", "fdel", "func")}
    if isinstance(value, weakref.ref):
        return {"is": value()}
    more: dict[str, Any] = {"class": kind}
    state: Any = None
    if isinstance(value, functools.partial):
        state, more["from"] = value.keywords, [value.func, *value.args, vars(value)]
    elif isinstance(value, nn.Module):
        state, more["in"] = _of_module(value), [name for name, _ in value.named_children()]
    elif isinstance(value, PreTrainedTokenizerBase):
        state = _of_tokenizer(value)
    else:
        reduced = copyreg.dispatch_table.get(kind, lambda x: x.__reduce_ex__(4))(value)
        if isinstance(reduced, str):
            name = f"{getattr(value, '__module__', kind.__module__)}.{reduced}"
            held = getattr(value, "__dict__", {})  # as a function with a cache has
            return {**held, "def": name} if held else name
        maker, made, state, items, pairs = (*reduced, None, None, None)[:5]
        new = maker is getattr(copyreg, "__newobj__")  # noqa: B009 -- of the class itself
        if made := made[1:] if new else (maker, *made):
            more["from"] = made
        if entries := [*(items or pairs or ())]:
            more["in"] = entries if items or kind is OrderedDict else dict(entries)
    if isinstance(state, tuple) and [type(x) for x in state[1:]] == [dict]:  # of slots too
        state = {**(state[0] or {}), **state[1]}
    if not isinstance(state, dict):  # a __reduce__ may leave out a user's attributes
        more |= {} if state is None else {"with": state}
        state = getattr(value, "__dict__", {}) if is_of_user(kind.__module__) else {}
    unread = UNREAD if isinstance(value, PushToHubMixin) else ()
    found = {k: x for k, x in state.items() if k not in unread and not _is_cached(kind, k)}
    return {**found, **more}


def _is_cached(kind: type, name: Any) -> bool:
    """Whether an attribute follows from others."""
    return isinstance(inspect.getattr_static(kind, str(name), None), functools.cached_property)


def _of_module(module: nn.Module) -> dict[str, Any]:
    """The attributes of ``module``, with hooks in their order: their numbers are the process's."""
    numbered = {k: x for k, x in vars(module).items() if "hooks" in k and isinstance(x, dict)}
    order = sorted({number for each in numbered.values() for number in each})
    hooks = {
        name: {order.index(number): hook for number, hook in each.items()}
        for name, each in numbered.items()
        if each
    }
    return {k: x for k, x in vars(module).items() if k not in numbered} | hooks


def _of_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The attributes of ``tokenizer``; without the padding and truncation of its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {name: each for name, each in vars(tokenizer).items() if each is not backend}
    if backend is not None:
        known = json.loads(backend.to_str())
        state["in"] = {k: x for k, x in known.items() if k not in ("padding", "truncation")}
    return state
