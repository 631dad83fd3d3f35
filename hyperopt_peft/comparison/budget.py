"""A budget in passes, one forward and backward over a training batch: the steps that it has."""

from __future__ import annotations


def rows_of(steps: int, rows: int, batch: int) -> int:
    """The rows that ``steps`` steps read of ``rows`` rows; an epoch's last batch may be smaller.

    Example:
        >>> [rows_of(steps, 10, 4) for steps in (2, 3, 4)]
        [8, 10, 14]
    """
    epochs, rest = divmod(steps, -(-rows // batch))
    return epochs * rows + min(rest * batch, rows)


def steps_for(allowed: float, rows: int, batch: int) -> int:
    """The most steps that read at most ``allowed`` rows.

    Example:
        >>> [steps_for(allowed, 10, 4) for allowed in (7, 8, 10, 14)]
        [1, 2, 3, 4]
    """
    epochs, rest = divmod(int(allowed), rows)
    return epochs * -(-rows // batch) + rest // batch


def phases(
    passes: float, *, lower: int, everything: int, batch: int, every: int, upper: float, again: bool
) -> tuple[int, int]:
    """The steps of the search and of the second training, which together take ``passes`` passes.

    Both have about as many steps. The search ends with an upper step.

    Args:
        passes: the budget.
        lower, everything: the rows of the lower level, and of both.
        batch: the rows of a lower step.
        every: the lower steps from one upper step to the next.
        upper: the rows that an upper step sends through the model beside those of its lower step.
        again: whether there is a second training.

    Example:
        >>> phases(300, lower=80, everything=100, batch=10, every=4, upper=20, again=True)
        (120, 120)
    """
    a_cycle = rows_of(every, lower, batch) + upper
    share = a_cycle + (rows_of(every, everything, batch) if again else 0)
    search = max(1, int(passes * batch // share)) * every
    spent = rows_of(search, lower, batch) + search // every * upper
    left = passes * batch - spent
    return search, steps_for(left, everything, batch) if again else 0
