"""An embedding with sparse gradients has the hypergradient of one with dense gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hyperopt_peft import Engine, Problem, hypergradient
from tests.support.quadratic import FunctionLevel, flat

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 7, (6, 3), generator=GENERATOR)
CLASSES = torch.randint(0, 3, (6,), generator=GENERATOR)


def levels(sparse: bool, above: bool) -> tuple[Problem, Problem]:
    """The embedding is at the upper level or at the lower one, under weights of rows."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(7, 4, sparse=sparse).double(), nn.Linear(4, 3).double()
    weights = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    u, w = [weights], [*head.parameters()]
    (u if above else w).append(embedding.weight)

    def loss(ids: Tensor) -> Tensor:
        losses = cross_entropy(head(embedding(ids).mean(1)), CLASSES, reduction="none")
        return (losses * weights.exp()).mean() + 0.05 * sum(p.square().sum() for p in [*w, *u][:2])

    optimizers = [torch.optim.SGD(owned, lr=0.1) for owned in (u, w)]
    return (
        FunctionLevel(lambda _: loss(IDS.flip(0)), u, optimizer=optimizers[0]),
        FunctionLevel(lambda _: loss(IDS), w, optimizer=optimizers[1]),
    )


@pytest.mark.filterwarnings("ignore:.* the relative residual is")
@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize(
    "method", ["direct", "darts", "minres", "kfac", "unrolled:steps=2", "f2sa"]
)
def test_sparse_gradients(method: str, above: bool) -> None:
    actual, expected = (flat(hypergradient(*levels(kind, above), method)) for kind in (True, False))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    trained = []
    for sparse in (True, False):
        upper, lower = levels(sparse, above)
        Engine(upper, lower, method, lower_steps=2, progress=False).run(2)
        trained.append(flat(upper.variables).detach())
    torch.testing.assert_close(*trained, rtol=1e-9, atol=1e-12)
