"""The command line ``hyperopt-peft``: a module of this package for each command."""

#: The commands and their summaries.
COMMANDS = {
    "init": "write a commented file of options for a table of yours",
    "train": "train an adapter with BiDoRA, LoRA or another method, evaluate and save it",
    "compare": "methods side by side: same data, budget and start, several seeds",
    "check": "examine the two levels, and estimators of the hypergradient, on your model and data",
    "attribute": "which training rows help or hurt on the evaluation examples, with a check",
    "merge": "put an adapter into its base model's weights, and check the result",
}
