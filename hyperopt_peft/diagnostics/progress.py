"""A progress bar of passes through a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from hyperopt_peft.hypergradients.products import Passes


class CountedPasses(Passes):
    """`Passes` that advance a progress bar by one for each pass or product."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        step = value - getattr(self, name, value) if name in ("gradients", "products") else 0
        super().__setattr__(name, value)
        if step:
            self._bar.update(step)


@contextmanager
def counted(description: str, most: int, *, progress: bool) -> Iterator[CountedPasses]:
    """Counts of passes, shown in a progress bar of at most ``most`` passes."""
    with tqdm(total=most, desc=description, unit="pass", leave=False, disable=not progress) as bar:
        yield CountedPasses(bar)
