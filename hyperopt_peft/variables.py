"""The tensors a level owns: named, checked, and no two over the same memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import Tensor

from hyperopt_peft.errors import ProblemError

Variables = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]


def named_variables(variables: Variables, level: str) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """The names and the tensors of ``variables``.

    Raises:
        ProblemError: no variables, one that is no leaf, needs no gradient or is complex, two of
            one name or over the same memory.
    """
    if isinstance(variables, Tensor) or not isinstance(variables, Iterable):
        raise ProblemError(
            f"{level}: variables must be tensors or (name, tensor) pairs, such as [w] or "
            f"model.named_parameters(), got {type(variables).__name__}"
        )
    if isinstance(variables, Mapping):
        variables = variables.items()
    pairs: list[tuple[str, Tensor]] = []
    for index, item in enumerate(variables):
        pair = item if isinstance(item, tuple) else (f"variable {index}", item)
        if len(pair) != 2 or not isinstance(pair[1], Tensor):
            raise ProblemError(
                f"{level}: variable {index} must be a tensor or a (name, tensor) pair, got {pair}"
            )
        name, tensor = str(pair[0]), pair[1]
        if not tensor.requires_grad:
            raise ProblemError(f"{level}: {name} does not require a gradient; it cannot be learnt")
        if not tensor.is_leaf:
            raise ProblemError(
                f"{level}: {name} is computed from other tensors; own the leaf it is computed from"
            )
        if tensor.is_complex():
            raise ProblemError(
                f"{level}: {name} is complex; own a real tensor with a last dimension of 2, and "
                "let the loss read it through torch.view_as_complex"
            )
        pairs.append((name, tensor))
    if not pairs:
        raise ProblemError(f"{level}: the level has no variables")
    names, tensors = zip(*pairs, strict=True)
    for name, count in Counter(names).items():
        if count > 1:
            raise ProblemError(f"{level}: two variables are called {name!r}")
    shared = shared_memory(pairs)
    if shared is not None:
        raise ProblemError(f"{level}: {shared[0]} and {shared[1]} are the same tensor or overlap")
    return names, tensors


def shared_memory(named: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The names of two tensors over the same memory, or None.

    Tensors without memory of their own (empty, meta, sharded) are told apart by identity.
    """
    spans = []
    for name, tensor in named:
        device, begin = str(tensor.device), tensor.data_ptr()
        if begin == 0:
            device, begin, length = "no memory", id(tensor), 1
        else:
            strides = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in strides)
            length = (last + 1) * tensor.element_size()
        spans.append((device, begin, begin + length, name))
    spans.sort()
    for (device, _, end, name), (other_device, begin, _, other) in pairwise(spans):
        if device == other_device and begin < end:
            return name, other
    return None
