"""Faults that the batches of two levels show: shared rows, and a loss that is a sum over rows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.data import entrywise
from hyperopt_peft.core.labels import rows_of
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.diagnostics.findings import Finding
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.utils.random_state import RandomState, replay


def batch_findings(oracle: Oracle) -> list[Finding]:
    """Warnings about the batches of an open oracle, by three evaluations of each loss."""
    upper, lower, findings = oracle.upper, oracle.lower, []
    above, below = _entries(oracle.upper_batch), _entries(oracle.lower_batch)
    keys = [key for key in above if key in below]
    if any(above[key].dim() > 1 for key in keys):  # labels or numbers of rows alone tell nothing
        rows, others = (_rows([entries[key] for key in keys]) for entries in (above, below))
        if shared := sum(row in others for row in rows):
            words = f"{shared} of the {len(rows)} rows of its batch are in the lower batch too"
            advice = "give the upper level rows that the lower level does not train on"
            findings.append(Finding("shared rows", "warning", upper.name, words, advice))
    for level, batch, state in (
        (upper, oracle.upper_batch, oracle.upper_random),
        (lower, oracle.lower_batch, oracle.lower_random),
    ):
        with suppress(Exception):  # half a batch may be no batch
            if not lower.nested and _is_sum(level, batch, state):
                words = "the loss of a batch is the sum of its halves' losses, not their mean"
                advice = "return the mean over rows, or steps and damping scale with the batch"
                findings.append(Finding("sum over rows", "warning", level.name, words, advice))
        oracle.buffers.restore()
    return findings


def _entries(batch: Any) -> dict[Any, Tensor]:
    """The tensors of ``batch`` with rows, by their key or position."""
    if not isinstance(batch, Mapping):
        batch = dict(enumerate(batch if isinstance(batch, list | tuple) else [batch]))
    return {key: x for key, x in batch.items() if isinstance(x, Tensor) and x.dim()}


def _rows(entries: list[Tensor]) -> list[Any]:
    """Each row's entries as bytes."""
    flat = [x.detach().cpu().contiguous().view(len(x), -1).view(torch.uint8) for x in entries]
    return list(zip(*([row.tobytes() for row in x.numpy()] for x in flat)))


def _is_sum(level: Problem, batch: Any, state: RandomState) -> bool:
    """Whether the loss of ``batch`` is that of its first half plus that of its second."""
    count = len(next(iter(_entries(batch).values())))

    def loss_of(part: slice) -> float:
        rows = entrywise(batch, lambda x: rows_of(x, count, part) if torch.is_tensor(x) else None)
        with replay(state):
            loss, metrics = level.evaluate(rows)
        return float(loss.detach()) - metrics.get("prior", 0.0)

    whole = loss_of(slice(None))
    halves = loss_of(slice(count // 2)) + loss_of(slice(count // 2, None))
    return count > 1 and abs(halves - whole) < 0.05 * abs(whole)
