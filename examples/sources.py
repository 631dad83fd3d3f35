"""Sources of unknown quality: which of them to train on, and how much?

    python examples/sources.py    # MiniLM and tweets, no network, half a minute

Five sources label tweets, two of them well. A few trusted tweets have right labels. A plan is a
share of the training loss for each source and for the trusted rows. A linear head on the frozen
model's features is trained by each plan without a fold of the trusted rows, which judges it. A user
cannot see the test accuracy. Learned weights are by the hypergradient at the head's minimum.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from text_data import load_model, model_path, quiet, tweets
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hyperopt_peft import Engine
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.labels import row_losses
from hyperopt_peft.engine.fit import lbfgs
from hyperopt_peft.problems import TaskLevel
from hyperopt_peft.problems.features import features_of
from hyperopt_peft.problems.head import L2, Head, l2_penalty

Batch = dict[str, Tensor]
#: What each source makes of a right label; the trusted rows are one source more, the last.
LABELLERS: dict[str, Callable[[int], int]] = {
    "clean 1": lambda label: label,
    "clean 2": lambda label: label,
    "60 % wrong": lambda label: (label + (random.random() < 0.6) * random.choice((1, 2))) % 3,
    "one label": lambda label: 1,
    "confused": lambda label: (label + (random.random() < 0.8)) % 3,
}


@dataclass
class Arguments:
    """The rows, the folds and the search."""

    rows: int = HfArg(default=80, help="tweets of each source")
    trusted: int = HfArg(default=40, help="tweets with right labels")
    test_size: int = HfArg(default=400, help="test tweets")
    folds: int = HfArg(default=5, help="of the trusted tweets")
    seed: int = HfArg(default=0, help="of the draw of tweets and labels")


def labelled(arguments: Arguments) -> tuple[list[Batch], Batch]:
    """The features and labels of each source and of the trusted rows; those of the test rows."""
    set_seed(arguments.seed)
    sizes = [arguments.rows] * len(LABELLERS) + [arguments.trusted, arguments.test_size]
    chosen = tweets().shuffle(seed=arguments.seed)[: sum(sizes)]
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    tokens = tokenizer(chosen["text"], truncation=True, max_length=20)
    rows = Dataset.from_dict({**tokens, "labels": chosen["label"]})
    model, collate = load_model("minilm", ["-", "0", "+"]), DataCollatorWithPadding(tokenizer)
    made = features_of(model, rows, collate).standardized()
    pairs = zip(made.x.split(sizes), made.labels.split(sizes), strict=True)
    parts = [{"features": x, "labels": labels} for x, labels in pairs]
    for part, labeller in zip(parts, LABELLERS.values()):
        part["labels"] = torch.tensor([labeller(label) for label in part["labels"].tolist()])
    return parts[:-1], parts[-1]


def joined(parts: list[Batch]) -> Batch:
    """All rows, with the number of their source."""
    numbered = [{**p, "source": torch.full_like(p["labels"], k)} for k, p in enumerate(parts)]
    return {name: torch.cat([part[name] for part in numbered]) for name in numbered[0]}


def head_of(parts: list[Batch]) -> Head:
    """A head of 0."""
    return Head(parts[0]["features"].shape[1], 3)


def level_of(parts: list[Batch], head: Head, shares: Callable[[], Tensor], **options: Any) -> Any:
    """The loss Σ_k p_k L_k of ``head``, by the shares p of the sources and the trusted rows."""
    counts = counts_of(parts)
    weights = lambda batch: (shares() * counts.sum() / counts)[batch["source"]]  # noqa: E731
    return WeightedRows(head, weights, tags=["source"], **options)


def counts_of(parts: list[Batch]) -> Tensor:
    """The number of rows of each source."""
    return torch.tensor([float(len(part["labels"])) for part in parts])


def trained(parts: list[Batch], mass: Tensor, near: Head | None = None) -> Head:
    """The head of least loss by shares as ``mass``, with W near that of another head."""
    head, shares = head_of(parts), mass / mass.sum()
    center = (near or head).weight.detach().clone()
    prior = lambda w: L2 / 2 * (w[0] - center).square().sum()  # noqa: E731
    lbfgs(level_of(parts, head, lambda: shares, prior=prior), joined(parts))
    return head


def learned(parts: list[Batch]) -> Tensor:
    """The shares that logits learned on the trusted rows give to each source."""
    head, logits = head_of(parts), torch.zeros(len(parts), requires_grad=True)
    options = {"data": [joined(parts)], "prior": l2_penalty()}
    lower = level_of(parts, head, lambda: logits.softmax(0), **options)
    prior = len(parts) / (8 * len(parts[-1]["labels"]))  # as that of `Sources`
    options = {"optimizer": torch.optim.Adam([logits], 0.6), "prior": prior}
    upper = TaskLevel(head, [logits], data=[parts[-1]], **options)
    Engine(upper, lower, "cg:steps=30", lower_steps="minimum", progress=False).run(15)
    return logits.softmax(0).detach()


def plans(parts: list[Batch]) -> dict[str, Callable[[], Head]]:
    """How each plan trains a head, by name."""
    counts, only = counts_of(parts), torch.eye(len(parts))
    shares = {
        "everything, equal weights": counts,
        "each source alike": torch.ones(len(parts)),
        **{f"without {name}": 1 - only[k] for k, name in enumerate(LABELLERS)},
        "by a look at the rows: clean and trusted": only[0] + only[1] + only[-1],
        "trusted rows 30 times": counts * (1 + 29 * only[-1]),
        "trusted rows alone": only[-1],
    }
    return {
        **{name: partial(trained, parts, mass) for name, mass in shares.items()},
        "everything, then trusted": lambda: trained(parts, only[-1], trained(parts, counts)),
        "learned weights": lambda: trained(parts, learned(parts)),
    }


def main() -> None:
    """Judge every plan by the folds of the trusted rows, and by the test rows."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    quiet()
    (*sources, trusted), test = labelled(arguments)
    fold = torch.arange(arguments.trusted) % arguments.folds
    losses: dict[str, Tensor] = {}
    for k in range(arguments.folds):
        rest, held_out = ({x: v[m] for x, v in trusted.items()} for m in (fold != k, fold == k))
        for name, plan in plans([*sources, rest]).items():
            each = row_losses(plan(), held_out)[0].detach()
            losses[name] = torch.cat([losses.get(name, each[:0]), each])
    best = min(losses, key=lambda name: float(losses[name].mean()))
    print("| plan | trusted loss | − least, ± standard error | test accuracy |\n|---|---|---|---|")
    for name, plan in plans([*sources, trusted]).items():
        gap = losses[name] - losses[best]
        right = (plan()(test["features"]).logits.argmax(1) == test["labels"]).double().mean()
        more = f"{gap.mean():.3f} ± {gap.std() / len(gap) ** 0.5:.3f}"
        print(f"| {name} | {losses[name].mean():.3f} | {more} | {right:.3f} |")
    shares = learned([*sources, trusted]).tolist()
    print("learned shares:", {n: round(s, 2) for n, s in zip([*LABELLERS, "trusted"], shares)})


if __name__ == "__main__":
    main()
