"""The problem of `timing`: an MLP whose samples are weighed by a second network.

    lower: min over w   mean_i σ_u(CE_i(w))·CE_i(w)      MLP 784-512-512-10, a batch of 128
    upper: min over u   mean CE(w) on a clean batch       σ_u: 1-100-1 with a sigmoid

(Shu et al. 2019, arXiv:1902.07379); random data, since only cost is measured.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hyperopt_peft import Engine
from hyperopt_peft.method import TaskLevel

Batch = tuple[Tensor, Tensor]


def networks(device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    """The MLP and the network that weighs its samples; the same ones each time."""
    torch.manual_seed(0)
    hidden = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    weigher = nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid()
    return nn.Sequential(*hidden).to(device), nn.Sequential(*weigher).to(device)


def batch(seed: int, device: str = "cpu") -> Batch:
    """128 images and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, 784, generator=generator)
    return x.to(device), torch.randint(0, 10, (128,), generator=generator).to(device)


def weighted_loss(net: nn.Module, weigher: nn.Module, batch: Batch) -> Tensor:
    """f: the weights are a function of the samples' losses, taken as constants."""
    losses = cross_entropy(net(batch[0]), batch[1], reduction="none")[:, None]
    return (weigher(losses.detach()) * losses).mean()


def engine(estimator: str, device: str = "cpu") -> Engine:
    """Ready to run, one lower step an upper step."""
    net, weigher = networks(device)
    lower = TaskLevel(
        net,
        net.named_parameters(),
        task_loss=partial(weighted_loss, net, weigher),
        data=[batch(0, device)],
        optimizer=torch.optim.SGD(net.parameters(), lr=0.01),
    )
    upper = TaskLevel(
        net,
        weigher.named_parameters(),
        task_loss=lambda batch: cross_entropy(net(batch[0]), batch[1]),
        data=[batch(1, device)],
        optimizer=torch.optim.SGD(weigher.parameters(), lr=0.01),
    )
    return Engine(upper, lower, estimator, progress=False)
