"""The upper level's batches: each is a function of its number, so that a run can resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import collating, require_examples
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import RandomState, replay

#: Up to this many examples an upper batch may be all of them.
FULL = 128
#: The column of the documents' lengths in rows that TRL has packed.
PACKED = "seq_lengths"


class UpperBatches(Dataset[Any]):
    """The upper level's batches, each a function of its number alone.

    A batch is ``count`` pieces of ``size`` examples. With ``full`` it is all of ``data``, in pieces
    of at most ``size`` examples, equally many on each process. Each epoch has another order.
    """

    def __init__(
        self,
        data: Any,
        size: int,
        *,
        seed: int,
        collate: Callable[[Sequence[Any]], Any],
        count: int = 1,
        full: bool = False,
        rank: int = 0,
        processes: int = 1,
        **loading: Any,
    ) -> None:
        require_examples("upper_dataset", data, by_index=True)
        if len(data) < processes:
            raise ProblemError(
                f"the upper level has {len(data)} examples for {processes} processes; raise "
                "upper_fraction or give a larger upper_dataset"
            )
        self.data, self.seed, self.collate = data, seed, collate
        self.rank, self.processes, self.loading = rank, processes, loading
        self.size = min(size, len(data) // processes)
        self.per_epoch = len(data) // (self.size * processes)
        self.used = self.per_epoch * self.size * processes
        if full:  # every process needs a row of each piece
            self.per_epoch = min(-(-len(data) // (size * processes)), len(data) // processes)
            self.used = len(data)
        self.count = self.per_epoch if full else min(count, self.per_epoch)
        self._batches: Iterator[Any] | None = None
        self._next = 0

    def pieces(self, number: int) -> list[tuple[Any, float]]:
        """This process's pieces of batch ``number``, counted from 0, each with its weight.

        The weights make the mean over all pieces of (weight · mean over the piece's examples) equal
        to the mean over the batch's examples.
        """
        numbers = range(number * self.count, (number + 1) * self.count)
        mean = self.used / (self.per_epoch * self.processes)
        return [(self.batch(n), len(self._share(n % self.per_epoch)) / mean) for n in numbers]

    def batch(self, number: int) -> Any:
        """This process's share of piece ``number``, counted from 0; an uneven rest is dropped."""
        if self._batches is None or number != self._next:
            self.close()
            # With its own generator the loader does not draw from the training's random stream.
            loader: DataLoader[Any] = DataLoader(
                self,
                batch_size=None,
                sampler=self._numbered_rows(number),
                collate_fn=_identity,
                generator=torch.Generator().manual_seed(self.seed),
                **self.loading,
            )
            self._batches = iter(loader)
        self._next = number + 1
        with collating("upper_dataset"):
            return next(self._batches)

    def close(self) -> None:
        """End the workers; the next ``batch`` starts them again."""
        self._batches = None

    def _numbered_rows(self, begin: int) -> Iterator[tuple[int, list[int]]]:
        """Piece numbers from ``begin`` on, with this process's rows; one permutation per epoch."""
        present, order = -1, torch.empty(0, dtype=torch.int64)
        for number in count(begin):
            epoch, position = divmod(number, self.per_epoch)
            if epoch != present:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                present, order = epoch, torch.randperm(len(self.data), generator=generator)
            share = self._share(position)
            yield number, order[share.start : share.stop].tolist()

    def _share(self, position: int) -> range:
        """The positions, in the epoch's order, of this process's share of piece ``position``."""
        number, count = position * self.processes + self.rank, self.per_epoch * self.processes
        return range(number * self.used // count, (number + 1) * self.used // count)

    def __getitem__(self, index: tuple[int, list[int]]) -> Any:
        number, rows = index
        together = getattr(self.data, "__getitems__", None)
        # The number of the batch seeds the random numbers of the data and the collator.
        with replay(RandomState.seeded((), self.seed, number, self.rank)):
            return self.collate(together(rows) if together else [self.data[row] for row in rows])


def _identity(batch: Any) -> Any:
    return batch


def upper_batches(trainer: Any) -> UpperBatches | None:
    """The batches of the upper level of ``trainer``, with the collator and workers of its loader.

    Without ``per_device_upper_batch_size`` a batch has as many pieces as a lower step has
    micro-batches, or all rows of a small data set, where the method asks for this.
    """
    if trainer.upper is None:
        return None
    data, args = trainer.upper_dataset, trainer.args
    full = getattr(trainer.method, "full_upper_batch", False)
    size = args.per_device_upper_batch_size
    loader = loader_of(trainer, data, "upper_dataset")
    if isinstance(data, datasets.Dataset):
        data = data.select_columns(loader.dataset.column_names)
    return UpperBatches(
        data,
        size or args.per_device_train_batch_size,
        count=1 if size else args.gradient_accumulation_steps,
        full=size is None and len(data) <= FULL and full,
        seed=args.seed,
        collate=loader.collate_fn,
        rank=distributed.rank(),
        processes=distributed.world_size(),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory and args.device.type != "cpu",
        prefetch_factor=loader.prefetch_factor,
        multiprocessing_context=loader.multiprocessing_context,
    )


def loader_of(trainer: Trainer, data: Any, name: str) -> Any:
    """The Trainer's loader of ``data``, the argument ``name``; a Dataset's first row suffices."""
    table = isinstance(data, datasets.Dataset)
    try:
        loader = trainer.get_test_dataloader(data.select(range(1)) if table else data)
    except ValueError as error:
        raise ProblemError(f"{name}: {error}") from error
    if table and PACKED in set(data.column_names) - set(loader.dataset.column_names):
        raise ProblemError(
            f"{name}: the rows are packed, but the trainer removes their column {PACKED!r} as "
            "unused, so documents would attend to each other; set remove_unused_columns=False "
            "with TRL's collator, or use bilevel(SFTTrainer)"
        )
    return loader
