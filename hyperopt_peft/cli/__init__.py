"""The command line ``hyperopt-peft``: one file for each subcommand."""

from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand: the module of this folder with its ``run``, and a summary."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("train", "train an adapter with BiDoRA, DoRA or LoRA, evaluate and save it"),
    "compare": Command(
        "compare_methods", "methods side by side: same data, budget and start, several seeds"
    ),
    "compare-estimators": Command(
        "compare_estimators", "estimators side by side on your model and data, and a recommendation"
    ),
    "check": Command("check", "diagnose the two levels on your model and data, in words"),
    "attribute": Command(
        "attribute", "which training rows help or hurt on the evaluation examples, with a check"
    ),
    "mix": Command(
        "mix", "how much each source of data should count, learnt on a few trusted examples"
    ),
    "merge": Command("merge", "put an adapter into its base model's weights, and check the result"),
}
