"""Settings, data sets and frozen weights, in which a checkpoint and a resumed run must agree."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.utils import data as torch_data
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from hyperopt_peft.adapters.layers import adapter_settings
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import RandomState, replay

#: The most rows that a fingerprint reads, evenly spaced.
FINGERPRINT_ROWS = 100_000
FEW_ROWS = 8
PLAIN = str | int | float
#: The most entries of a tensor that a fingerprint reads, evenly spaced.
FINGERPRINT_ENTRIES = 64


def data_fingerprint(data: Any, most: int = FINGERPRINT_ROWS) -> str | int | None:
    """A fingerprint of the contents, order and number of rows of ``data``.

    For a `datasets.Dataset`, a list or a tuple it is a hash of at most about ``most`` rows.
    Reading a data set of PyTorch may be slow, so it is of `FEW_ROWS`; where they are not the same
    if read twice, and for other data, it is the length, or None.
    """
    of_torch = isinstance(data, torch_data.Dataset) and not isinstance(data, IterableDataset)
    if not has_length(data) or not (of_torch or isinstance(data, Dataset | list | tuple)):
        return len(data) if has_length(data) else None
    rows = range(0, len(data), max(1, len(data) // (FEW_ROWS if of_torch else most)))
    if not isinstance(data, Dataset):
        hashes = set[str]()
        for _ in range(2 if of_torch else 1):
            with replay(RandomState.seeded([], "fingerprint")):
                hashes.add(Hasher.hash((len(data), [data[row] for row in rows])))
        return hashes.pop() if len(hashes) == 1 else len(data)
    digest = hashlib.sha256(f"{len(data)} {data.column_names}".encode())
    read = data if rows.step == 1 else data.select(rows)
    for table in read.with_format("arrow").iter(1000):
        plain = pyarrow.Table.from_arrays(table.columns, names=table.column_names)
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, plain.schema) as stream:
            stream.write_table(plain.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()


@torch.no_grad()
def sample(tensor: Tensor) -> Tensor:
    """At most `FINGERPRINT_ENTRIES` entries of ``tensor``, evenly spaced, on the CPU."""
    count = 0 if tensor.is_meta else tensor.numel()
    places = torch.linspace(
        0, max(count - 1, 0), min(FINGERPRINT_ENTRIES, count), dtype=torch.float64
    )
    flat = tensor.new_empty(0, device="cpu") if count == 0 else tensor.detach().reshape(-1)
    return flat[places.long().to(flat.device)].cpu().contiguous()


@torch.no_grad()
def frozen_fingerprint(model: nn.Module, levels: Iterable[Problem]) -> str:
    """A hash of process 0's weights of ``model`` that no level owns.

    It covers names, shapes, dtypes and at most `FINGERPRINT_ENTRIES` entries of each tensor, so
    that a large model costs one small copy from the device per tensor.
    """
    owned = {id(variable) for level in levels for variable in level.variables}
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        if id(tensor) in owned:
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample(tensor).view(torch.uint8).numpy().tobytes())
    return distributed.first(digest.hexdigest())


def options_of(method: Any) -> dict[str, Any]:
    """The public attributes of ``method`` as JSON, before any hook has changed them.

    A tensor that requires a gradient may be random, and is left out. A method that is given to
    another trainer has the options that it had in the first one.
    """
    names = {*vars(method), *(x.name for x in (fields(method) if is_dataclass(method) else ()))}
    names = vars(method).setdefault("_options", {x for x in names if x[0] != "_"})
    options = {name: getattr(method, name) for name in sorted(names)}
    return _as_json({n: x for n, x in options.items() if not getattr(x, "requires_grad", False)})


def settings_of(trainer: Any) -> dict[str, Any]:
    """The settings, as JSON, in which a checkpoint and the run that resumes must agree."""
    settings: dict[str, Any] = {}
    if (method := trainer.method) is not None:
        if hasattr(trainer.model, "peft_config"):
            settings = adapter_settings(trainer.model)
        settings["method"] = name = type(method).__name__
        settings.update({f"{name}.{option}": x for option, x in trainer.phase.options.items()})
        if trainer.phase.search is not None:
            settings["search"] = trainer.phase.search
    functions = {"row_losses": trainer.phase.row_losses, **trainer.options_again}
    for name in ("data_collator", "compute_loss_func", "row_losses"):  # class, plain attributes
        given = functions.get(name)
        own = {**getattr(given, "keywords", {}), **getattr(given, "__dict__", {})}  # of a partial
        function = getattr(given, "func", given)
        kind = getattr(function, "__qualname__", type(function).__qualname__)
        settings[name] = [kind, {n: x for n, x in own.items() if isinstance(x, PLAIN)}]
    settings |= {
        **trainer.args.resume_must_match(),
        "hypergradient": repr(trainer.estimator) if trainer.upper is not None else None,
        "processes": distributed.world_size(),
        "train_dataset": data_fingerprint(trainer.train_dataset),
        "upper_dataset": data_fingerprint(trainer.upper_dataset),
        **{name: list(tensor.shape) for name, tensor in trainer.named_tensors()},
        # Under FSDP2 processes have shards, and some get weights from process 0 in training.
        "frozen weights of the model": (
            None if trainer.is_fsdp_enabled else frozen_fingerprint(trainer.model, trainer.levels)
        ),
    }
    return _as_json(settings)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=_text))
    return plain


def _text(value: Any) -> Any:
    """A set in order; of a function or an object no address, which is another in each process."""
    value = sorted(map(str, value)) if isinstance(value, set | frozenset) else value
    return re.sub(r" at 0x\w+", "", str(value))
