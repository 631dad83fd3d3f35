"""The mathematics of examples/methods/hyperparameters.py."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from hyperopt_peft import Engine
from hyperopt_peft.adapters.gains import gained_layers
from tests.support.examples import example

EXAMPLE = example("methods/hyperparameters.py")
SGD = partial(torch.optim.SGD, lr=1.0, momentum=0.5)


class Sum(nn.Module):
    """y = first(x) + second(z), with the mean square as its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor, z: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.first(x) + self.second(z) - y).square().mean())


def base() -> Any:
    torch.manual_seed(0)
    return Sum().double()


def tuned() -> tuple[Any, ...]:
    """The method, its model, and its levels away from their start."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["first", "second"])
    model, method = get_peft_model(base(), config), EXAMPLE.Hyperparameters(decay=0.2)
    x, z = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    batches = [{"x": x[k], "z": z[k], "y": x[k] @ torch.randn(8, 6).double()} for k in (0, 1)]
    options: Any = {"data": [[batch] for batch in batches], "optimizers": [SGD, SGD]}
    upper, lower = method.levels(model, **options)
    with torch.no_grad():
        for p in lower.variables:
            p += torch.randn_like(p) / 2
        for each in gained_layers(model):
            each.gain.u += torch.randn_like(each.gain.u)
    return method, model, upper, lower


def test_all_are_differentiated_through_the_steps() -> None:
    """Three steps of gradient descent with momentum at the learnt rate, as one graph."""
    method, model, upper, lower = tuned()
    w, u = dict(zip(lower.names, lower.variables, strict=True)), upper.variables
    before, velocity = [x.detach().clone() for x in u], None
    for _ in range(3):
        loss = functional_call(model, w, (), lower.peek_batch()).loss
        for name, p in w.items():
            layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
            loss = loss + method.log_decays[layer].exp() / 2 * p.square().sum()
        g = grad(loss, list(w.values()), create_graph=True)
        velocity = g if velocity is None else [v / 2 + d for v, d in zip(velocity, g, strict=True)]
        pairs = zip(w.items(), velocity, strict=True)
        w = {n: p - method.log_rate.exp() * v for (n, p), v in pairs}
    expected = grad(functional_call(model, w, (), upper.peek_batch()).loss, u)
    Engine(upper, lower, "unrolled:steps=3", lower_steps=3, progress=False).run(1)
    for old, new, part in zip(before, u, expected, strict=True):
        torch.testing.assert_close(old - new.detach(), part, rtol=1e-9, atol=1e-13)
