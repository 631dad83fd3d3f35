"""A progress bar of passes through a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from hyperopt_peft.hypergradients.products import Passes


@contextmanager
def counted(description: str, most: int, *, progress: bool) -> Iterator[Passes]:
    """Counts of passes, shown in a progress bar of at most ``most`` passes."""
    with tqdm(total=most, desc=description, unit="pass", leave=False, disable=not progress) as bar:
        yield Passes(update=bar.update)
