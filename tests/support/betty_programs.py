"""Programs for Betty, over a module ``betty`` that is Betty's own or ours."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

DOUBLE = {"dtype": torch.float64}


class Values(nn.Module):
    """One parameter, which the module returns."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, **DOUBLE))

    def forward(self) -> Tensor:
        return self.values


def rows(seed: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """``count`` batches of eight rows, x ``(8, 4)`` and y ``(8,)``."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, 4, generator=random, **DOUBLE)
    truth = torch.tensor([1.0, -2.0, 0.5, 0.0], **DOUBLE)
    noise = torch.randn(count, 8, generator=random, **DOUBLE)
    return list(zip(x, x @ truth + 0.3 * noise, strict=True))


def optimizer_of(kind: str, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(module.parameters(), lr=lr)
    return torch.optim.SGD(module.parameters(), lr=lr, momentum=0.5)


def ridge(
    betty: Any, engine: dict[str, Any], lower: dict[str, Any], upper: dict[str, Any], **hooks: Any
) -> SimpleNamespace:
    """Ridge regression whose log penalties (4) are learnt; ``hooks`` are of the lower problem."""

    class Outer(betty.ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            loss = torch.log(torch.cosh(x @ self.inner() - y)).mean()
            return {"loss": loss, "level": 1.0}

    class Inner(betty.ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            return (x @ self() - y).square().mean() + (self.outer().exp() * self() ** 2).sum() / 2

    inner_class = type("WithHooks", (Inner,), {x: f for x, f in hooks.items() if callable(f)})
    kind = hooks.get("optimizer", "sgd")
    u, w = Values([-1.0, -0.5, 0.0, -2.0]), Values([0.1, 0.2, -0.1, 0.3])
    optimizers = optimizer_of(kind, u, 0.3), optimizer_of(kind, w, 0.05)
    schedulers = [torch.optim.lr_scheduler.StepLR(x, 3, 0.7) for x in optimizers]
    outer = Outer("outer", betty.Config(**upper), u, optimizers[0], schedulers[0], rows(1))
    inner = inner_class("inner", betty.Config(**lower), w, optimizers[1], schedulers[1], rows(2))
    graph = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]} if hooks.get("u2l", True) else {}}
    config = betty.EngineConfig(strategy="cpu", **engine)
    return SimpleNamespace(
        engine=betty.Engine([outer, inner], config, graph), outer=outer, inner=inner, u=u, w=w
    )


def chain(betty: Any, lower: dict[str, Any], middle: dict[str, Any], **engine: Any) -> Any:
    """Rates of three penalties, learnt over a model that is drawn to a pretrained one."""

    class Top(betty.ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            return (x @ self.finetune() - y).square().mean()

    class Finetune(betty.ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            drawn = (self() - self.pretrain()).square().sum()
            return torch.log(torch.cosh(x @ self() - y)).mean() + 0.5 * drawn

    class Pretrain(betty.ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            loss = (x @ self() - y).square() * torch.sigmoid(self.top()).repeat(2)
            return loss.mean() + 0.05 * self().square().sum()

    modules = Values([0.0, 0.5, -0.5, 1.0]), Values([0.1] * 4), Values([-0.1] * 4)
    problems = []
    for i, (kind, name, config) in enumerate(
        [(Top, "top", {}), (Finetune, "finetune", middle), (Pretrain, "pretrain", lower)]
    ):
        optimizer = optimizer_of("sgd", modules[i], 0.1)
        options = betty.Config(**config)
        loader = rows(i)
        problems.append(kind(name, options, modules[i], optimizer, train_data_loader=loader))
    top, finetune, pretrain = problems
    graph = {
        "l2u": {pretrain: [finetune, top], finetune: [top]},
        "u2l": {top: [finetune, pretrain]},
    }
    config = betty.EngineConfig(strategy="cpu", **engine)
    return SimpleNamespace(
        engine=betty.Engine(problems, config, graph), values=[x.values for x in modules]
    )
