"""A bilevel program and an estimator for it, in one file.

Which training examples should count? The lower level fits a classifier to noisy labels with a
weight for each example; the upper level moves the weights to help on a few clean ones.
"""

from dataclasses import dataclass

import torch
from hyperopt_peft import Engine, Problem, Solver, compare_hypergradients, register
from hyperopt_peft.hypergradients import Solution, dot, zeros_like
from torch.nn.functional import cross_entropy

torch.manual_seed(0)
centres = 2 * torch.randn(4, 16)
labels, clean_labels = torch.randint(4, (300,)), torch.randint(4, (60,))
x, clean_x = (centres[y] + torch.randn(len(y), 16) for y in (labels, clean_labels))
wrong = torch.rand(300) < 0.4
noisy_labels = torch.where(wrong, torch.randint(4, (300,)), labels)

net = torch.nn.Linear(16, 4, bias=False)
sample_logits = torch.zeros(300, requires_grad=True)


class Train(Problem):
    def loss(self, batch):
        each = cross_entropy(net(x), noisy_labels, reduction="none")
        return (sample_logits.sigmoid() * each).mean() + 0.01 * net.weight.square().sum()


class Clean(Problem):
    def loss(self, batch):
        return cross_entropy(net(clean_x), clean_labels)


@register("steepest", kind="implicit", tolerance=0.02)
@dataclass(frozen=True)
class SteepestDescent(Solver):
    """v ← v + (rᵀr / rᵀHr) r, r = b − Hv: steepest descent on ½vᵀHv − bᵀv (Cauchy 1847)."""

    steps: int = 20

    def solve(self, matvec, b):
        v, r = zeros_like(b), b
        for _ in range(self.steps):
            q = matvec(r)
            alpha = dot(r, r) / dot(r, q)
            v, r = v + alpha * r, r - alpha * q
        return Solution(v, r.norm() / b.norm(), self.steps)


train = Train(net.named_parameters(), optimizer=torch.optim.SGD(net.parameters(), lr=0.5))
clean = Clean([sample_logits], optimizer=torch.optim.Adam([sample_logits], lr=0.1))
history = Engine(clean, train, "steepest:steps=10", lower_steps=10).run(100)
share, losses = (sample_logits < 0).eq(wrong).float().mean(), [r["upper_loss"] for r in history]
print(
    f"clean loss {losses[0]:.3f} → {losses[-1]:.3f}; {share:.0%} of the weights on the right side"
)
print(compare_hypergradients(clean, train, ["direct", "darts", "steepest", "cg", "minres"]))
