"""Baselines: an adapter trained in one level on all rows.

    min over A, B (and m), head   L(A, B, m; D)

LoRA: Hu et al. 2021, arXiv:2106.09685. DoRA: Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets
from peft import LoraConfig

from hyperopt_peft.method import (
    Method,
    Model,
    PositiveInt,
    ProblemError,
    TaskLoss,
    WeightedRows,
    joined,
    option,
    require_examples,
    set_norm_grad,
    use_fast_dora,
)


@dataclass
class LoRA(Method):
    """One level over all trainable parameters, on the rows of both levels.

    Batches, logs, checkpoints and resuming are the same as in bilevel methods, so that a comparison
    is fair. An adapter that the model already has is trained as it is.

    Example:
        >>> from peft import LoraConfig
        >>> LoRA().adapter(LoraConfig(use_dora=True)).use_dora
        False
    """

    def adapter(self, config: LoraConfig) -> LoraConfig:
        """``config`` without magnitudes."""
        if hasattr(config, "use_dora"):
            config.use_dora = False
        return config


@dataclass
class DoRA(Method):
    """As `LoRA`, with magnitudes; the row norm is outside the graph, as in PEFT.

    Raises:
        ProblemError: at the start of a training, a layer of the model has no magnitude.

    Example:
        >>> from peft import LoraConfig
        >>> DoRA().adapter(LoraConfig()).use_dora
        True
    """

    fast_dora: bool = option(True, help="linear layers run a fast forward pass, not PEFT's")

    def adapter(self, config: LoraConfig) -> LoraConfig:
        """``config`` with magnitudes."""
        config.use_dora = True
        return config

    def prepare(self, model: Model) -> None:
        """Let the layers of ``model`` run the fast forward pass, or PEFT's."""
        (use_fast_dora if self.fast_dora else set_norm_grad)(model, "detach")


@dataclass
class TrustedRepeated(Method):
    """All rows with equal weights, and the rows of ``upper_dataset`` ``times`` times.

    Example:
        >>> from datasets import Dataset
        >>> train, trusted = Dataset.from_dict({"x": [1, 2]}), Dataset.from_dict({"x": [7]})
        >>> TrustedRepeated(times=3).all_rows(train, trusted)["x"][:]
        [1, 2, 7, 7, 7]
    """

    times: PositiveInt = 10

    def all_rows(self, train: Any, upper: Any) -> Any:
        """The training rows, and the trusted ones ``times`` times."""
        require_examples("upper_dataset", upper)
        more = concatenate_datasets([upper] * self.times)
        return joined(train_dataset=train, upper_dataset=more)


@dataclass
class GivenWeights(Method):
    """All rows, each with a given weight, for example the one that `attribute` writes.

    The loss is Σ v_i ℓ_i/N over rows with N labels together: a weight of 0 leaves a row out and the
    batches as they are.

    Raises:
        ProblemError: a weight is negative or not finite; the rows have no column ``weight``.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"x": [1, 2], "weight": [1.0, -1.0]})
        >>> GivenWeights().rows(rows, None)
        Traceback (most recent call last):
        ...
        hyperopt_peft.errors.ProblemError: row 1 (from 0) of 'weight' is -1.0; give numbers from 0
    """

    tags = ("weight",)

    def rows(self, train: Dataset, upper: Dataset | None) -> tuple[Any, Any]:
        """Both as they are; a trusted row without a weight has 1."""
        if upper is not None and "weight" not in upper.column_names:
            upper = upper.add_column("weight", [1.0] * len(upper))
        return _with_floats(train), upper and _with_floats(upper)

    def lower(self, model: Model, task_loss: TaskLoss) -> WeightedRows:
        """Σ v_i ℓ_i/N over the trainable parameters of ``model``."""
        weights = lambda batch: batch["weight"]  # noqa: E731
        return WeightedRows(model, weights, tags=self.tags, row_losses=self.row_losses)


def _with_floats(rows: Any) -> Any:
    """``rows`` with their weights as float64, from 0."""
    if "weight" not in rows.column_names:
        return rows
    values = rows["weight"][:]
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ProblemError(f"row {row} (from 0) of 'weight' is {value!r}; give numbers from 0")
    return rows.remove_columns("weight").add_column("weight", list(map(float, values)))
