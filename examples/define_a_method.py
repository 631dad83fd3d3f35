"""A method of your own in thirty lines: checked, run, and compared with LoRA and its frozen form.

    python examples/define_a_method.py    # MiniLM and tweets, no network, two minutes

Whoever labelled the tweets called most negative ones neutral. For each label y the method learns,
on a few trusted tweets, the distribution over classes that a tweet with this label is trained for:

    upper: min over U   mean of −log p_y(x; w*(U)), over the trusted tweets
    lower: min over w   mean of −Σ_k softmax(U_y)_k log p_k(x; w), over all tweets

(labels as distributions: Wu et al. 2020, arXiv:2008.00627). A batch pads its tweets to the longest
one, and the loss of a tweet must not depend on that: `Method.logits_of` gives the model the
attention mask. The script compares such a loss with one that forgets the mask.
Guide: docs/define-a-method.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when torch is imported: threads that spin while they wait take the core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Method, compare_methods
from hyperopt_peft.comparison import Choice
from hyperopt_peft.heads import compute_once
from hyperopt_peft.method import option
from hyperopt_peft.problems import LoRA
from peft import get_peft_model
from torch.nn.functional import cross_entropy, one_hot
from transformers import HfArgumentParser, set_seed

from text_data import CLASSES, TRAINING, adapter, base_model, quiet, relabelled, split_tweets


@dataclass
class SoftLabels(Method):
    """For each label a distribution over the classes, learned on trusted rows."""

    certainty: float = option(4.0, help="initial U of the label's own class; 0 of the others")

    tags = ("trusted",)
    defaults = {"hypergradient": "darts", "lower_steps": 2}

    def prepare(self, model: Any) -> None:
        """U, on the device of the model."""
        eye = torch.eye(model.config.num_labels, device=next(model.parameters()).device)
        self.u = (self.certainty * eye).requires_grad_()

    def upper_variables(self, model: Any) -> dict[str, Any]:
        """U."""
        return {"u": self.u}

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        """The mean of −Σ_k softmax(U_y)_k log p_k; the label of a trusted row counts as it is."""
        labels, logits = batch["labels"], self.logits_of(model, batch)
        trusted, given = batch["trusted"].bool()[:, None], one_hot(labels, logits.shape[1])
        return cross_entropy(logits, given.to(logits).where(trusted, self.u.softmax(1)[labels]))


RATE, UPPER_RATE, CONFUSED = 6e-3, 0.3, 7  # of ten negative tweets are labelled neutral
ADAPTER = adapter(5)  # in the last layer: those below it are computed once for each tweet


@dataclass
class Arguments:
    """The rows, the budget, and the folder for results."""

    output_dir: str = option("outputs/define_a_method", help="where results are written")
    rows: int = option(300, help="training tweets")
    trusted: int = option(60, help="tweets with right labels")
    test_rows: int = option(400, help="test tweets")
    passes: int = option(160, help="passes, forward and backward, over 16 rows per training")
    seeds: int = option(4, help="trainings of each method")


@torch.no_grad()
def error_of_padding(model: Any, rows: list[Any], collate: Any, *left_out: str) -> float:
    """The relative change of the mean loss of ``rows`` if one batch pads them."""
    (method := SoftLabels()).prepare(model)

    def loss(some: list[Any]) -> float:
        batch = {name: x for name, x in collate(some).items() if name not in left_out}
        return method.lower_loss(model, batch, None).item()

    return abs(loss(rows) * len(rows) / sum(loss([row]) for row in rows) - 1)


def main() -> None:
    """Check the loss, train the method once, and compare."""
    (arguments,) = HfArgumentParser((Arguments,)).parse_args_into_dataclasses()
    quiet()
    output = Path(arguments.output_dir)
    sizes = {"train": arguments.rows, "trusted": arguments.trusted, "test": arguments.test_rows}
    parts, collate = split_tweets(sizes, seed=0, max_length=32)
    labels = [max(y, int(k % 10 < CONFUSED)) for k, y in enumerate(parts["train"]["label"])]
    sets = relabelled(parts["train"], labels), parts["trusted"], parts["test"]
    train, trusted, test = (x.add_column("trusted", [int(x is not sets[0])] * len(x)) for x in sets)
    model, rows = base_model().eval(), train.remove_columns("text").select(range(16)).to_list()
    right, wrong = (error_of_padding(model, rows, collate, *x) for x in ([], ["attention_mask"]))
    print(f"padding changes the loss by {right:.1g}, and without the mask by {wrong:.1g}")

    args = BilevelTrainingArguments(
        str(output / "adapter"),
        max_steps=arguments.passes // 2,
        learning_rate=RATE,
        upper_learning_rate=UPPER_RATE,
        per_device_upper_batch_size=16,
        logging_steps=1000,
        **TRAINING,
    )
    set_seed(0)
    model, method = get_peft_model(base_model(), ADAPTER), SoftLabels()
    options = {"train_dataset": train, "upper_dataset": trusted, "data_collator": collate}
    trainer = BilevelTrainer(model, args, method=method, **options)
    compute_once(trainer, dropout=False)
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    print(f"{'label':10}is trained for {', '.join(CLASSES)}")
    for name, shares in zip(CLASSES, method.u.softmax(1).tolist()):
        print(f"{name:25}" + "".join(f"{x:10.2f}" for x in shares))

    comparison = compare_methods(
        {"LoRA": LoRA(), "SoftLabels": SoftLabels()},
        base_model,
        ADAPTER,
        args,
        **options,
        test_dataset=test,
        passes=arguments.passes,
        seeds=range(arguments.seeds),
        metric="accuracy",
        choice=Choice([RATE], [UPPER_RATE]),  # without one, ten runs a seed would choose rates
        ablations={"SoftLabels": ["frozen"]},
        compute_metrics=lambda x: {"accuracy": (x.predictions.argmax(1) == x.label_ids).mean()},
    )
    print(comparison)
    comparison.plot(output / "methods.png")


if __name__ == "__main__":
    main()
