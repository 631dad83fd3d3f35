"""The types of models, batches and rows, which the libraries below type loosely or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

#: A batch as a collator makes it: the arguments of the model's forward by name, mostly tensors.
Batch = Mapping[str, Any]
#: A data collator, a function from some rows to a batch.
Collate = Callable[[Sequence[Any]], Any]


class Rows(Protocol):
    """Rows that are read by number: a `datasets.Dataset`, a list, or a data set of PyTorch.

    Example:
        >>> def first(rows: Rows) -> dict[str, int]:
        ...     return rows[0]
        >>> first([{"labels": 1}])
        {'labels': 1}
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Model(Protocol):
    """A module with the attributes of its own library, such as ``config`` and ``peft_config``.

    `torch.nn.Module` has this type; its own attributes are typed as tensors or modules only.

    Example:
        >>> def size(model: Model) -> int:
        ...     return sum(parameter.numel() for parameter in model.parameters())
        >>> size(nn.Linear(2, 3))
        9
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of a forward pass."""

    def __getattr__(self, name: str, /) -> Any: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters, in the order of the modules."""
