"""The update rules of torch's optimizers as functions that autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Options = Mapping[str, Any]
Moments = Mapping[str, Tensor]
Update = tuple[Tensor, dict[str, Tensor]]
# A second moment is 0 if every gradient was 0 (lora_A's at B = 0), where the square root has no
# derivative. This addition, far below eps², gives it one.
TINY = 1e-36


@dataclass(frozen=True)
class Rule:
    """(g, moments) ↦ (Δ, moments') with w' = w + lr·Δ, where g includes the L2 decay.

    Attributes:
        update: Δ and the new moments, from the options of the parameter group, g, the moments by
            torch's names, the number of the step, from 1, and whether there is no state yet.
        names: torch's names of the moments of a step with some options.

    Example:
        >>> options = {"momentum": 0.5, "dampening": 0.0, "nesterov": False}
        >>> g, buffer = torch.tensor([1.0]), torch.tensor([2.0])
        >>> RULES[torch.optim.SGD].update(options, g, {"momentum_buffer": buffer}, 1, False)
        (tensor([-2.]), {'momentum_buffer': tensor([2.])})
    """

    update: Callable[[Options, Tensor, Moments, int, bool], Update]
    names: Callable[[Options], list[str]]


def _mean(old: Tensor, new: Tensor, decay: float) -> Tensor:
    return decay * old + (1 - decay) * new


def _sgd(o: Options, g: Tensor, old: Moments, step: int, fresh: bool) -> Update:
    if not o["momentum"]:
        return -g, {}
    # A new buffer is the gradient itself.
    buffer = o["momentum"] * old["momentum_buffer"] + (g if fresh else (1 - o["dampening"]) * g)
    descent = g + o["momentum"] * buffer if o["nesterov"] else buffer
    return -descent, {"momentum_buffer": buffer}


def _adam(o: Options, g: Tensor, old: Moments, step: int, fresh: bool) -> Update:
    beta1, beta2 = map(float, o["betas"])
    m = _mean(old["exp_avg"], g, beta1)
    v = largest = _mean(old["exp_avg_sq"] + TINY, g * g, beta2)
    new = {"exp_avg": m, "exp_avg_sq": v}
    if o["amsgrad"]:
        largest = new["max_exp_avg_sq"] = torch.maximum(old["max_exp_avg_sq"] + TINY, v)
    root = (largest / (1 - beta2**step)).sqrt()
    return -(m / (1 - beta1**step)) / (root + o["eps"]), new


def _rmsprop(o: Options, g: Tensor, old: Moments, step: int, fresh: bool) -> Update:
    v = variance = _mean(old["square_avg"] + TINY, g * g, o["alpha"])
    new = {"square_avg": v}
    if o["centered"]:
        new["grad_avg"] = _mean(old["grad_avg"], g, o["alpha"])
        variance = v - new["grad_avg"] ** 2
    descent = g / (variance.sqrt() + o["eps"])
    if o["momentum"]:
        descent = new["momentum_buffer"] = o["momentum"] * old["momentum_buffer"] + descent
    return -descent, new


def _adagrad(o: Options, g: Tensor, old: Moments, step: int, fresh: bool) -> Update:
    total = old["sum"] + TINY + g * g
    rate = 1 / (1 + (step - 1) * o["lr_decay"])
    return -rate * g / (total.sqrt() + o["eps"]), {"sum": total}


def _adadelta(o: Options, g: Tensor, old: Moments, step: int, fresh: bool) -> Update:
    v = _mean(old["square_avg"], g * g, o["rho"])
    descent = ((old["acc_delta"] + o["eps"]) / (v + o["eps"])).sqrt() * g
    return -descent, {"square_avg": v, "acc_delta": _mean(old["acc_delta"], descent**2, o["rho"])}


def _adamax(o: Options, g: Tensor, old: Moments, step: int, fresh: bool) -> Update:
    beta1, beta2 = map(float, o["betas"])
    m = _mean(old["exp_avg"], g, beta1)
    largest = torch.maximum(beta2 * old["exp_inf"], g.abs() + o["eps"])
    return -(m / (1 - beta1**step)) / largest, {"exp_avg": m, "exp_inf": largest}


def _radam(o: Options, g: Tensor, old: Moments, step: int, fresh: bool) -> Update:
    beta1, beta2 = map(float, o["betas"])
    m, v = _mean(old["exp_avg"], g, beta1), _mean(old["exp_avg_sq"] + TINY, g * g, beta2)
    c2, limit = 1 - beta2**step, 2 / (1 - beta2) - 1
    length, descent = limit - 2 * step * (1 - c2) / c2, m / (1 - beta1**step)
    if length > 5:
        top, bottom = (length - 4) * (length - 2) * limit, (limit - 4) * (limit - 2) * length
        descent = descent * (c2 * top / bottom) ** 0.5 / (v.sqrt() + o["eps"])
    return -descent, {"exp_avg": m, "exp_avg_sq": v}


def _with(*names: str, **others: str) -> Callable[[Options], list[str]]:
    """``names``, and each of ``others`` whose option is set."""
    return lambda o: [*names, *(name for option, name in others.items() if o.get(option))]


_ADAM = Rule(_adam, _with("exp_avg", "exp_avg_sq", amsgrad="max_exp_avg_sq"))
RULES: dict[type, Rule] = {
    torch.optim.SGD: Rule(_sgd, _with(momentum="momentum_buffer")),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.RMSprop: Rule(
        _rmsprop, _with("square_avg", centered="grad_avg", momentum="momentum_buffer")
    ),
    torch.optim.Adagrad: Rule(_adagrad, _with("sum")),
    torch.optim.Adadelta: Rule(_adadelta, _with("square_avg", "acc_delta")),
    torch.optim.Adamax: Rule(_adamax, _with("exp_avg", "exp_inf")),
    torch.optim.RAdam: Rule(_radam, _with("exp_avg", "exp_avg_sq")),
}
