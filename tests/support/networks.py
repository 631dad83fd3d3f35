"""A small classifier that remembers, drops and normalises, as two levels over one network."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from hyperopt_peft import Problem
from hyperopt_peft.utils.random_state import RandomState


class Network(nn.Module):
    """Linear, batch normalisation, a gate, dropout, linear; ``bias`` of the first is frozen."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.first.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.gate = nn.Parameter(torch.ones(4))
        self.temperature = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.tanh(self.norm(self.first(x))) * self.gate)
        return self.head(hidden) * self.temperature


class Classify(Problem):
    """Cross-entropy of the network on a batch, and a pull of the variables towards zero."""

    def __init__(self, net: Network, variables: Iterable[Any], **options: Any) -> None:
        self.net = net
        super().__init__(variables, **options)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Mapping[str, Any]:
        x, y = batch
        logits = self.net(x)
        pull = sum(v.square().sum() for v in self.net.parameters() if v.requires_grad)
        accuracy = (logits.argmax(1) == y).double().mean()
        return {"loss": cross_entropy(logits, y) + 0.05 * pull, "accuracy": accuracy}


def loader(size: int, generator: torch.Generator | None = None) -> DataLoader[Any]:
    """A shuffled loader over ``size`` points, 4 a batch, the last one smaller."""
    source = torch.Generator().manual_seed(size)
    x = torch.randn(size, 5, generator=source)
    y = torch.randint(0, 3, (size,), generator=source)
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=generator)


def network_levels(
    count: int = 2,
    *,
    dropout: float = 0.3,
    generators: bool = False,
    rates: Sequence[float] = (0.05, 0.05, 0.05),
) -> list[Classify]:
    """Two or three levels over one network, from the top, with Adam and a schedule each.

    They are equal at every call; ``generators`` gives each loader a generator of its own.
    """
    torch.manual_seed(0)
    net = Network(dropout)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    above = [["gate", "temperature"]] if count == 2 else [["temperature"], ["gate", "norm.weight"]]
    names = [*above, [name for name in named if not any(name in names for names in above)]]
    levels = []
    for k, size in enumerate((14, 18) if count == 2 else (10, 14, 18)):
        variables = {name: named[name] for name in names[k]}
        adam = torch.optim.Adam(variables.values(), lr=rates[k])
        generator = torch.Generator().manual_seed(k) if generators else None
        options = {"data": loader(size, generator), "optimizer": adam, "name": f"level {k}"}
        schedule = LambdaLR(adam, lambda step: 1 / (1 + step / 5))
        levels.append(Classify(net, variables, scheduler=schedule, **options))
    return levels


def seed_all(seed: int) -> None:
    for function in (torch.manual_seed, np.random.seed, random.seed):
        function(seed)


def draw_from_all(*levels: Classify) -> None:
    """Let each loss depend on NumPy's and Python's numbers too; the second normal one is cached."""

    def drawing(loss: Any) -> Any:
        def evaluate(batch: Any) -> Any:
            result = loss(batch)
            drawn = np.random.rand() + abs(np.random.normal()) + random.random()
            return {**result, "loss": result["loss"] * (1 + drawn / 100)}

        return evaluate

    for level in levels:
        level.loss = drawing(level.loss)  # type: ignore[method-assign]


class Interruption(Exception):
    pass


def interrupt(levels: Iterable[Any], at: int, *, in_backward: bool = False) -> Callable[[], int]:
    """Make the ``at``-th evaluation of a loss fail, forward or backward; returns the count."""
    count = 0

    def fail(_: Tensor) -> None:
        raise Interruption

    def wrap(loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def wrapped(batch: Any) -> Any:
            nonlocal count
            count += 1
            if count != at:
                return loss(batch)
            if not in_backward:
                raise Interruption
            result = loss(batch)
            result["loss"].register_hook(fail)
            return result

        return wrapped

    for level in levels:
        level.loss = wrap(level.loss)
    return lambda: count


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two structures of tensors and plain values are not equal bit by bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for k, (x, y) in pairs for d in differences(x, y, f"{where}/{k}")]
    return [] if type(a) is type(b) and (a == b or (a != a and b != b)) else [where]


def snapshot(*levels: Classify) -> dict[str, Any]:
    """Copies of all that a hypergradient must not change, except the data's position."""
    net = levels[0].net
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    optimizers = [level.optimizer_snapshot(with_state=True) for level in levels]
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "objects": {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()},
        "gradients": {
            name: (p.requires_grad, id(p.grad), None if p.grad is None else p.grad.clone())
            for name, p in net.named_parameters()
        },
        "optimizers": optimizers,
        "random": RandomState.capture().states,
        "modes": [module.training for module in net.modules()],
        "hooks": len(nn.modules.module._global_forward_pre_hooks),
    }


def give_gradients(net: nn.Module) -> None:
    """Gradients that the user holds while asking for a hypergradient."""
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
