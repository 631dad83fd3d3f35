"""BiDoRA: the magnitudes of DoRA learned on validation data, the directions on training data.

    upper: min over m        L(A*, B*, m; D_val)
    lower: A*, B*(m) = argmin over A, B, head   L(A, B, m; D_train) + γ·R(W0 + sBA)

The weight of a layer is W' = m ⊙ (W0 + sBA)/‖W0 + sBA‖, with one norm for each output row. D_train
and D_val are disjoint parts of the training set. R is small where the columns of the directions
are orthogonal. Qin et al. 2024, arXiv:2410.09758.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from peft import LoraConfig
from torch import Tensor

from hyperopt_peft.method import (
    Batch,
    Method,
    Model,
    NonNegativeFloat,
    TaskLevel,
    TaskLoss,
    gram_penalty,
    option,
    regularised,
    set_norm_grad,
    split_parameters,
    use_fast_dora,
)


@dataclass
class BiDoRA(Method):
    """Magnitudes above, directions and head below; then these alone, on all rows.

    Raises:
        ProblemError: γ is negative or ``norm_grad`` unknown; later, a layer has no magnitude.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> levels = Direction(model, gamma=0.1), Magnitude(model)
        >>> [tuple(x.shape) for level in levels for x in level.variables]
        [(2, 4), (3, 2), (3,)]
    """

    gamma: NonNegativeFloat = option(0.0, help="γ, of the Gram regulariser; published: 1e-5")
    norm_grad: Literal["full", "detach"] = option("full", help="detach: a constant norm, as PEFT")
    fast_dora: bool = option(True, help="linear layers run a fast forward pass, not PEFT's")
    paper: bool = option(False, help="take the estimator of BiDoRA's code, ``darts`` with ξ = 1")

    # Cheaper than the published defaults, darts and an upper step after each lower one.
    defaults = {"hypergradient": "direct", "lower_steps": 4}
    published_defaults = {"hypergradient": "darts:scheme=forward,xi=1.0"}

    @classmethod
    def published(cls, **options: Any) -> Self:
        """BiDoRA with ``paper``.

        Example:
            >>> BiDoRA.published(gamma=1e-5).defaults["hypergradient"]
            'darts:scheme=forward,xi=1.0'
        """
        return cls(paper=True, **options)

    def adapter(self, config: LoraConfig) -> LoraConfig:
        """``config`` with magnitudes."""
        config.use_dora = True
        return config

    def prepare(self, model: Model) -> None:
        """Let the layers of ``model`` have the row norm and the forward pass of the options."""
        (use_fast_dora if self.fast_dora else set_norm_grad)(model, self.norm_grad)

    def upper_variables(self, model: Model) -> dict[str, Tensor]:
        """The magnitudes."""
        return dict(split_parameters(model).magnitudes)

    def lower(self, model: Model, task_loss: TaskLoss) -> Direction:
        """`Direction` of ``model``."""
        return Direction(model, gamma=self.gamma, task_loss=task_loss)

    def upper(self, model: Model, task_loss: TaskLoss) -> Magnitude:
        """`Magnitude` of ``model``."""
        return Magnitude(model, task_loss=task_loss)


class Direction(TaskLevel):
    """Lower level: min over A, B, head of L(A, B, m; D_train) + γ·R.

    ``model`` is a PeftModel with ``use_dora=True``; further arguments are those of `TaskLevel`.
    """

    def __init__(self, model: Any, *, gamma: float = 0.0, **level: Any) -> None:
        self.gamma = gamma
        parts = split_parameters(model)
        super().__init__(model, [*parts.directions.items(), *parts.rest.items()], **level)

    def loss(self, batch: Batch) -> Any:
        """L(A, B, m) + γ·R; L and R are metrics too."""
        return regularised(self.task_loss(batch), self.gamma, gram_penalty, self.model)


class Magnitude(TaskLevel):
    """Upper level: min over m of L(A, B, m; D_val); arguments as for `Direction`.

    The weight decay of an optimizer would shrink m towards 0, and with m the pretrained weights; a
    ``prior`` pulls m to its initial value.
    """

    def __init__(self, model: Any, **level: Any) -> None:
        super().__init__(model, split_parameters(model).magnitudes, **level)
