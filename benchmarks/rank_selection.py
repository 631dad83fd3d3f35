"""Do searched ranks help? Turned digits, a few labels, many seeds.

    python benchmarks/rank_selection.py

A network of four square layers learns scikit-learn's digits as they are. An adapter of those layers
and a new head then learn the images turned by a quarter from ``--labels`` examples. Ranks from the
search are compared with the same ranks dealt out to the layers at random and with one rank for all
that takes no fewer parameters, all trained on all labels for the same number of steps.
"""

import copy
import math
import random
import statistics
from types import SimpleNamespace

import torch
from measure import arguments, report
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from hyperopt_peft import Engine
from hyperopt_peft.adapters import add_selection, rank_config, selected_ranks
from hyperopt_peft.problems.common import Adapter
from hyperopt_peft.problems.rank_selection import Components, Selection

LAYERS = [f"layers.{index}" for index in range(4)]
RANK, RATE = 8, 1e-2
#: form, decay, threshold
SEARCHES = {"softmax": (0.0, 1.0), "sigmoid": (1e-2, 1.0)}


class Net(nn.Module):
    """64 pixels, four layers of 64, ten classes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in LAYERS)
        self.head = nn.Linear(64, 10)

    def forward(self, x, y):
        """Loss and accuracy."""
        for layer in self.layers:
            x = torch.relu(layer(x))
        scores = self.head(x)
        accuracy = (scores.argmax(1) == y).float().mean()
        return SimpleNamespace(loss=cross_entropy(scores, y), accuracy=accuracy)


def digits(labels, seed):
    """Upright images to begin with; turned ones to learn (``labels`` of them) and to test."""
    images, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x = images.float().view(-1, 8, 8) / 8 - 1
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))

    def part(rows, turned):
        chosen = x[rows].rot90(1, (1, 2)) if turned else x[rows]
        return {"x": chosen.reshape(-1, 64), "y": y[rows]}

    split = order.split([700, labels, len(y) - 700 - labels])
    return [part(rows, turned) for rows, turned in zip(split, (False, True, True), strict=True)]


def minimise(model, batch, steps):
    """Adam on all trainable parameters."""
    level = Adapter(model)
    optimizer = torch.optim.Adam(level.variables, lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        level.loss(batch).backward()
        optimizer.step()


def searched(start, batch, form, steps):
    """The model after a search on halves of ``batch``."""
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=LAYERS, modules_to_save=["head"])
    model = add_selection(get_peft_model(copy.deepcopy(start), config), form)
    half = len(batch["y"]) // 2
    lower = Components(
        model, decay=SEARCHES[form][0], data=[{k: v[:half] for k, v in batch.items()}]
    )
    upper = Selection(model, data=[{k: v[half:] for k, v in batch.items()}])
    lower.optimizer = torch.optim.Adam(lower.variables, lr=RATE)
    upper.optimizer = torch.optim.Adam(upper.variables, lr=5 * RATE)
    Engine(upper, lower, "darts:scheme=forward", lower_steps=2, progress=False).run(steps // 2)
    return model


def accuracies(form, seed, labels, steps):
    """Test accuracy and sum of ranks of each kind of ranks; the ranks that were found."""
    torch.manual_seed(seed)
    upright, batch, test = digits(labels, seed)
    start = Net()
    minimise(start, upright, 200)
    nn.init.normal_(start.head.weight, std=0.1)
    model = searched(start, batch, form, steps)
    found = selected_ranks(model, SEARCHES[form][1])
    dealt = list(found.values())
    random.Random(seed).shuffle(dealt)
    plans = {
        "searched": found,
        "shuffled": dict(zip(found, dealt, strict=True)),
        "uniform": dict.fromkeys(found, math.ceil(sum(dealt) / len(dealt))),
        f"all {RANK}": dict.fromkeys(found, RANK),
    }
    results = {}
    for name, ranks in plans.items():
        torch.manual_seed(seed)
        adapter = get_peft_model(copy.deepcopy(start), rank_config(model, ranks))
        minimise(adapter, batch, steps)
        with torch.no_grad():
            results[name] = float(adapter(**test).accuracy), sum(ranks.values())
    return results, list(found.values())


def spread(values):
    """Mean ± standard error, in points of per cent."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.mean(values):.2f} ± {100 * error:.2f}"


def main():
    """Measure, print, and write JSON where asked for."""
    given = arguments("searched ranks against others on turned digits", seeds=12, labels=100)
    seeds, steps = (2, 50) if given.quick else (given.seeds, 200)
    rows, details = [], {}
    for form in SEARCHES:
        runs = [accuracies(form, seed, given.labels, steps) for seed in range(seeds)]
        details[form] = [found for _, found in runs]
        for name in runs[0][0]:
            accuracy, total = zip(*(results[name] for results, _ in runs), strict=True)
            uniform = [results["uniform"][0] for results, _ in runs]
            ahead = [a - b for a, b in zip(accuracy, uniform, strict=True)]
            row = {"search": form, "ranks": name, "sum of ranks": statistics.mean(total)}
            row["test accuracy, %"] = spread(accuracy)
            row["ahead of uniform, same seed"] = "–" if name == "uniform" else spread(ahead)
            rows.append(row)
    title = f"Mean ± standard error over {seeds} seeds, {given.labels} labels, {steps} steps"
    report(given, {title: rows}, [], {"ranks": details})


if __name__ == "__main__":
    main()
