"""The command line ``hyperopt-peft``: a module of this package for each command."""

#: The commands and their summaries.
COMMANDS = {
    "init": "guess the options for your table and write them to a commented file",
    "train": "train an adapter by LoRA, DoRA, BiDoRA or another method; evaluate and save it",
    "compare": "compare methods at equal passes, on the same data and seeds",
    "attribute": "score training rows: which are helpful, which harmful, on rows that you trust",
}
