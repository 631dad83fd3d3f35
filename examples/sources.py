"""Sources of unknown quality: which of them to train on, and how much?

    python examples/sources.py    # MiniLM and tweets, no network, a minute

Five sources label tweets, two of them well; a few trusted tweets have right labels. Each mixture of
sources trains a head on frozen features without one fold of the trusted tweets, which then judges
the head. The second table has the accuracy on test tweets, which a user would not have.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from datasets import Dataset
from hyperopt_peft import BilevelTrainingArguments, compare_methods, problems
from hyperopt_peft.comparison import HeadSettings
from hyperopt_peft.method import option
from transformers import AutoTokenizer, HfArgumentParser

from text_data import load_model, model_path, quiet, tweets

#: For each source, a function from the right label to the label that the source gives.
LABELLERS: dict[str, Any] = {
    "clean 1": lambda label: label,
    "clean 2": lambda label: label,
    "60 % wrong": lambda label: (label + (random.random() < 0.6) * random.choice((1, 2))) % 3,
    "one label": lambda label: 1,
    "confused": lambda label: (label + (random.random() < 0.8)) % 3,
}
#: A head has no adapter, so `LoRA` stands for all rows with equal weights.
MIXTURES: dict[str, Any] = {
    "equal shares": problems.EqualSources(),
    "all rows, equal weights": problems.LoRA(),
    "trusted rows alone": problems.SomeSources(),
    "trusted rows 30 times": problems.TrustedRepeated(times=30),
    "chosen by looking": problems.SomeSources(["clean 1", "clean 2"]),
    **{f"no {x}": problems.SomeSources([y for y in LABELLERS if y != x]) for x in LABELLERS},
    "agreement": problems.Agreement(log_odds=True),
    "learned weights": problems.Sources(),
}


@dataclass
class Arguments:
    """The rows and the folds."""

    rows: int = option(80, help="tweets of each source")
    trusted: int = option(40, help="tweets with right labels")
    test_size: int = option(400, help="test tweets")
    folds: int = option(5, help="number of folds of the trusted tweets")
    seed: int = option(0, help="seed that draws tweets and labels")


def main() -> None:
    """Judge every mixture by the folds of the trusted rows, and by the test rows."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    quiet()
    random.seed(arguments.seed)
    names = [name for name in LABELLERS for _ in range(arguments.rows)]
    ends = [0, len(names), end := len(names) + arguments.trusted, end + arguments.test_size]
    chosen = tweets().shuffle(seed=arguments.seed)[: ends[-1]]
    tokenizer = AutoTokenizer.from_pretrained(model_path("minilm"))
    rows = Dataset.from_dict({**tokenizer(chosen["text"]), "labels": chosen["label"]})
    train, trusted, test = (rows.select(range(*each)) for each in pairwise(ends))
    labels = [LABELLERS[name](label) for name, label in zip(names, train["labels"])]
    train = train.remove_columns("labels").add_column("labels", labels).add_column("source", names)
    model, args = partial(load_model, "minilm", ["-", "0", "+"]), BilevelTrainingArguments("unused")
    options: Any = {"train_dataset": train, "upper_dataset": trusted, "processing_class": tokenizer}
    compare = partial(compare_methods, MIXTURES, model, None, args, **options, head=HeadSettings())
    folds = compare(folds=arguments.folds)
    print(f"{folds}\n\n{folds.recommendation()}\n")
    right = lambda out: {"accuracy": (out.predictions.argmax(1) == out.label_ids).mean()}  # noqa: E731
    print(compare(test_dataset=test, metric="accuracy", compute_metrics=right))


if __name__ == "__main__":
    main()
