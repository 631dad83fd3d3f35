"""The command line ``hyperopt-peft``: a subcommand a file, and what they share."""

from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand: the module of this folder whose ``run`` it is, and what it does."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("train", "train an adapter with BiDoRA, DoRA or LoRA, evaluate and save it"),
    "compare": Command(
        "compare_methods", "methods side by side: same data, budget and start, several seeds"
    ),
    "compare-estimators": Command(
        "compare_estimators", "which estimator is worth its price on your model and data"
    ),
    "check": Command("check", "what is wrong with the two levels on your model and data, in words"),
    "merge": Command("merge", "put an adapter into its base model's weights, and check the result"),
}
