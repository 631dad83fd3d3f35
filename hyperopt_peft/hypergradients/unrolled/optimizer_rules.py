"""The update rules of torch's optimizers as functions, from TorchOpt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation

Options = Mapping[str, Any]
Moments = Mapping[str, Tensor]
# A second moment is 0 if every gradient was 0 (of lora_A while B = 0), and the square root has no
# derivative at 0. Adding this number, far below eps², gives it one.
TINY = 1e-36


@dataclass(frozen=True)
class Rule:
    """(g, moments) ↦ (Δ, moments') with w' = w + lr·Δ, where g includes the L2 decay.

    ``make`` returns TorchOpt's transformation for the options of a parameter group, with learning
    rate 1 and no decay, since TorchOpt accepts these as floats only. ``moments`` maps the fields of
    TorchOpt's state to torch's names.
    """

    make: Callable[[Options], GradientTransformation]
    moments: Mapping[str, str]

    def names(self, options: Options) -> list[str]:
        """torch's names for the moments of a step with ``options``."""
        state: Any = self.make(options).init(())
        fields = {field for part in state for field in part._fields}
        return [name for field, name in self.moments.items() if field in fields]

    def update(
        self, options: Options, g: Tensor, moments: Moments, count: int, fresh: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Δ and the new moments, by torch's names, of one variable after ``count`` earlier steps.

        ``fresh`` says that the variable has no optimizer state yet.
        """
        damped, momentum = options.get("dampening", 0.0), options.get("momentum", 0.0)
        if momentum and damped and not fresh:  # a new buffer is the gradient itself
            g = (1 - damped) * g
        before: dict[str, Any] = {
            field: moments[name] for field, name in self.moments.items() if name in moments
        }
        for field in {"nu", "sum_of_squares"} & set(before):
            before[field] = before[field] + TINY
        if "trace" in before:  # TorchOpt's first call does not multiply the trace by the momentum
            before["trace"] = momentum * before["trace"]
        before["count"] = torch.tensor(count, dtype=torch.float64)
        before = {field: [value] for field, value in before.items()} | {"t": count + 1}
        transformation = self.make(options)
        state: Any = transformation.init((g,))
        state = tuple(
            part._replace(**{field: before[field] for field in part._fields if field in before})
            for part in state
        )
        updates: Any
        updates, state = transformation.update((g,), state, params=(g,), inplace=False)
        after = {field: getattr(part, field) for part in state for field in part._fields}
        return updates[0], {self.moments[f]: after[f][0] for f in self.moments if f in after}


def _passing(make: Callable[..., GradientTransformation], *names: str) -> Any:
    """``make`` with learning rate 1 and the options ``names``."""
    return lambda o: make(1.0, **{name: o[name] for name in names})


_ADAM = Rule(
    lambda o: torchopt.adam(1.0, betas=tuple(map(float, o["betas"])), eps=o["eps"]),
    {"mu": "exp_avg", "nu": "exp_avg_sq"},
)
RULES: dict[type, Rule] = {
    torch.optim.SGD: Rule(
        _passing(torchopt.sgd, "momentum", "nesterov"), {"trace": "momentum_buffer"}
    ),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.RMSprop: Rule(
        _passing(torchopt.rmsprop, "alpha", "eps", "momentum", "centered"),
        {"mu": "grad_avg", "nu": "square_avg", "trace": "momentum_buffer"},
    ),
    torch.optim.Adagrad: Rule(
        _passing(torchopt.adagrad, "lr_decay", "eps"), {"sum_of_squares": "sum"}
    ),
    torch.optim.Adadelta: Rule(
        _passing(torchopt.adadelta, "rho", "eps"), {"mu": "square_avg", "nu": "acc_delta"}
    ),
    torch.optim.Adamax: Rule(
        _passing(torchopt.adamax, "betas", "eps"), {"mu": "exp_avg", "nu": "exp_inf"}
    ),
    torch.optim.RAdam: Rule(
        _passing(torchopt.radam, "betas", "eps"), {"mu": "exp_avg", "nu": "exp_avg_sq"}
    ),
}
