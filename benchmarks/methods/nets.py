"""Nets with one hidden layer, many of which are trained at once: the runs of many comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from transformers.modeling_outputs import SequenceClassifierOutput

from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Run

FEATURES, HIDDEN, BATCH, TEST, SEEDS = 20, 16, 8, 500, 20
#: The budget of a run in steps, which are passes.
STEPS = 60
#: Draws that are trained together.
TOGETHER = 10


class Draws:
    """The rows of several draws, and trainings on them.

    Args:
        count: the training rows of each method.
        held_out: the share of them in a held-out part.
        generator: of all random numbers.
        cliff: above this rate, in the middle, a training ends at chance.
    """

    def __init__(
        self,
        count: Mapping[str, int],
        held_out: float,
        generator: torch.Generator,
        cliff: float = float("inf"),
    ) -> None:
        self.count, self.generator, self.cliff = count, generator, cliff
        self.held_out = held_out
        self.train, self.test = self.rows(max(count.values())), self.rows(TEST)
        #: The order of the rows by which a seed, with every method, holds parts out.
        self.order = {n: self.permuted((TOGETHER, SEEDS), n) for n in {*count.values()}}

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Features, the first four with a mean of ±0.45 by the class, and classes 0 and 1."""
        classes = torch.randint(0, 2, (TOGETHER, count), generator=self.generator).float()
        features = torch.randn(TOGETHER, count, FEATURES, generator=self.generator)
        features[..., :4] += 0.45 * (2 * classes[..., None] - 1)
        return features, classes

    def permuted(self, shape: tuple[int, ...], count: int) -> Tensor:
        """Permutations of ``count`` numbers."""
        return torch.rand(*shape, count, generator=self.generator).argsort(-1)

    def do(self, stage: Sequence[Sequence[Run]], stores: Sequence[Store]) -> None:
        """Add the missing runs of a stage of each draw to its store."""
        every = [(k, x) for k, runs in enumerate(stage) for x in stores[k].missing(runs)]
        for name in self.count:
            if mine := [each for each in every if each[1].method == name]:
                for (k, run), curve in zip(mine, self.curves(mine), strict=True):
                    marked = [(mark, curve[round(mark)]) for mark in run.marks]
                    end = round(run.stop or STEPS)
                    line = {"metrics": curve[end], "curve": marked, "spent": {"lower steps": end}}
                    stores[k].add({**asdict(run), **line})

    @torch.no_grad()
    def curves(self, every: Sequence[tuple[int, Run]]) -> list[dict[int, dict[str, float]]]:
        """The metrics of runs of one method and one stage, by the step."""
        draw, runs = torch.tensor([k for k, _ in every]), [run for _, run in every]
        count = self.count[runs[0].method]
        order, part = self.order[count], round(self.held_out * count)
        if runs[0].split is None:
            rows = torch.arange(count).expand(len(runs), -1)
            features, classes = self.test[0][draw], self.test[1][draw]
        else:
            orders = [order[k, x.seed].roll(-part * (x.split or 0)) for k, x in every]
            held, rows = torch.stack(orders).split((part, count - part), 1)
            features, classes = (each[draw[:, None], held] for each in self.train)
        passes = -(-STEPS * BATCH // rows.shape[1])
        rows = rows.gather(1, self.permuted((len(runs), passes), rows.shape[1]).flatten(1))
        rates = torch.tensor([[run.upper_rate or run.rate, run.rate] for run in runs])
        noise = torch.randn(len(runs), generator=self.generator)
        alive = rates.amax(1) < self.cliff * torch.exp(0.2 * noise)
        found: list[dict[int, dict[str, float]]] = [{} for _ in runs]
        ends = {round(mark) for run in runs for mark in (*run.marks, run.stop or STEPS)}
        for step, net in enumerate(self.nets(draw, rows, rates), 1):
            if step not in ends:
                continue
            logits = net_of(net, features)[1][..., 0] * alive[:, None]
            accuracy = ((logits > 0) == classes.bool()).double().mean(1)
            loss = softplus((1 - 2 * classes) * logits).double().mean(1)
            for curve, one, other in zip(found, accuracy.tolist(), loss.tolist(), strict=True):
                curve[step] = {"eval_accuracy": one, "eval_loss": other}
        return found

    def nets(self, draw: Tensor, rows: Tensor, rates: Tensor) -> Iterator[list[Tensor]]:
        """The weights of all nets after each step of Adam, at rates that decay to 0.

        Args:
            draw: (nets,).
            rows: (nets, at least STEPS · BATCH), the row numbers of all steps.
            rates: (nets, 2), of the first layer and of the second.
        """
        shapes, g = ((FEATURES, HIDDEN), (1, HIDDEN), (HIDDEN, 1), (1, 1)), self.generator
        net = [torch.randn(len(draw), *shape, generator=g) / shape[0] ** 0.5 for shape in shapes]
        net[1], net[3] = 0 * net[1], 0 * net[3]
        means, squares = ([torch.zeros_like(x) for x in net] for _ in range(2))
        scale = rates[:, [0, 0, 1, 1], None, None].unbind(1)
        for step in range(STEPS):
            batch = rows[:, step * BATCH : (step + 1) * BATCH]
            x, y = (each[draw[:, None], batch] for each in self.train)
            hidden, logits = net_of(net, x)
            error = (logits.sigmoid() - y[..., None]) / BATCH
            back = error @ net[2].mT * (1 - hidden**2)
            slopes = x.mT @ back, back.sum(1, True), hidden.mT @ error, error.sum(1, True)
            decay, first, second = 1 - step / STEPS, 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
            for weight, slope, mean, square, rate in zip(net, slopes, means, squares, scale):
                mean.lerp_(slope, 0.1)
                square.mul_(0.999).addcmul_(slope, slope, value=0.001)
                weight -= decay * rate * (mean / first) / ((square / second).sqrt() + 1e-8)
            yield net


def net_of(net: Sequence[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden layer and the logits of all nets."""
    hidden = torch.baddbmm(net[1], features, net[0]).tanh()
    return hidden, torch.baddbmm(net[3], hidden, net[2])


class Net(nn.Module):
    """The net of `Draws`, for a Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2))

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """The loss and the logits."""
        logits = self.layers(x)
        return SequenceClassifierOutput(cross_entropy(logits, labels), logits)
