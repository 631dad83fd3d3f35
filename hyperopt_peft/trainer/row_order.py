"""A collator that keeps the order of its rows, as every number of a row needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.random_state import RandomState, replay


@dataclass(frozen=True)
class InOrder:
    """Calls ``collate``; ProblemError if that sorts the rows, such as the longest first.

    Rows of different lengths are collated in two orders, from one random state. Rows that are equal
    in every length cannot show it, and neither can rows that ``collate`` joins. So a batch is
    tested if a length differs in it that differed in no batch before.

    Example:
        >>> def longest_first(rows):
        ...     rows = sorted(rows, key=lambda row: -len(row["x"]))
        ...     return {"x": torch.tensor([sum(row["x"]) for row in rows])}
        >>> InOrder(longest_first)([{"x": [1]}, {"x": [2, 3]}])
        Traceback (most recent call last):
            ...
        hyperopt_peft.errors.ProblemError: data_collator: ...
    """

    collate: Callable[[Sequence[Any]], Any]
    tested: set[str] = field(default_factory=set)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The batch of ``rows``."""
        sizes = [_sizes(row) for row in rows]
        differ = {n for n, size in sizes[0].items() if any(x.get(n) != size for x in sizes)}
        if not differ <= self.tested:
            self.tested.update(differ)
            # One row of each kind: of equal ones a random mask would tell the first from the second.
            some = [*{tuple(x.values()): row for x, row in zip(sizes, rows, strict=True)}.values()]
            random_state = RandomState.capture()
            one, other = (self._of_rows(x, random_state) for x in (some, [*some[1:], some[0]]))
            if other != [*one[1:], one[0]] and sorted(other) == sorted(one):
                raise ProblemError(
                    "data_collator: returns its rows in another order, so that numbers of rows "
                    "would be beside other rows; let it keep the order"
                )
        return self.collate(rows)

    def _of_rows(self, rows: Sequence[Any], random_state: RandomState) -> list[bytes]:
        """All that the batch of ``rows`` has of each of them."""
        with replay(random_state):
            batch = self.collate(deepcopy(rows))  # it may change them
        sized = [x for x in batch.values() if isinstance(x, Tensor) and x.shape[:1] == (len(rows),)]
        whole = [x.cpu().double().numpy() for x in sized]
        return [b"".join(x[row].tobytes() for x in whole) for row in range(len(rows))]


def _sizes(row: Mapping[str, Any]) -> dict[str, Any]:
    """The shape or the length of each entry of ``row``, and its attention mask in words."""
    mask = row.get("attention_mask")
    sizes = {name: _size(value) for name, value in row.items()}
    return {**sizes, "": str(mask.tolist() if hasattr(mask, "tolist") else mask)}


def _size(value: Any) -> Any:
    if hasattr(value, "shape"):
        return tuple(value.shape)
    return len(value) if isinstance(value, Sized) else 0
