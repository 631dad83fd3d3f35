"""A progress bar whose unit is a pass over the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from hyperopt_peft.hypergradients.products import Passes


class CountedPasses(Passes):
    """Counts passes and products as `Passes` does, and moves a bar by one for each."""

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
    """Passes under a bar that ends at ``most`` of them, or before where fewer are enough."""
    with tqdm(total=most, desc=description, unit="pass", leave=False, disable=not progress) as bar:
        yield CountedPasses(bar)
