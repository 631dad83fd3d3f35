"""Fine-tune a pretrained encoder with LoRA and with BiLoRA on the same few examples.

    python examples/bilora.py            # MiniLM and tweets, no network
    python examples/bilora.py --quick    # the same, smaller: under a minute
    python examples/bilora.py --seed 1 --train_size 1000 --gamma 0.01

Both start from the same head and take the same number of steps on batches of the same size; BiLoRA
gives a part of the examples to its singular values. Each option of `BilevelTrainingArguments`,
`transformers.TrainingArguments` among them, is a flag.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Read when torch is imported: threads that spin while they wait make a step ten times slower
# as soon as another program wants one of two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from peft import LoraConfig, get_peft_model
from text_data import TextData, load_data, load_model, logits_of, quiet, reload
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments
from hyperopt_peft.adapters import pseudo_singular_values, use_pseudo_svd
from hyperopt_peft.problems.bilora import SingularValues, SingularVectors
from hyperopt_peft.problems.common import Adapter


@dataclass
class Arguments:
    """What to train, and on what."""

    model: str = HfArg(
        default="minilm", help="minilm (from its package), a local folder, or a hub name"
    )
    dataset: str = HfArg(
        default="tweets", help="tweets (from its package), a local folder, or a hub name"
    )
    train_size: int = HfArg(default=300, help="training examples, for both levels together")
    test_size: int = HfArg(default=1000, help="test examples at most")
    max_length: int = HfArg(default=64, help="tokens an example")
    rank: int = HfArg(default=8, help="rank r of the update")
    alpha: int = HfArg(default=16, help="LoRA's alpha; the update's scale is alpha / r")
    dropout: float = HfArg(default=0.1, help="dropout on the adapter's input")
    gamma: float = HfArg(default=0.1, help="weight of the orthogonality penalty")
    quick: bool = HfArg(
        default=False,
        help="a small run: 100 training and 200 test examples, 12 steps, whatever else is said",
    )


@dataclass
class Training(BilevelTrainingArguments):
    """How to train: the defaults of this example."""

    output_dir: str | None = HfArg(
        default="outputs/bilora", help="where results and adapter are written"
    )
    max_steps: int = HfArg(default=120, help="steps of LoRA, and of P, Q and head in BiLoRA")
    lower_steps: int = HfArg(default=2, help="lower steps from one upper step to the next")
    learning_rate: float = HfArg(default=2e-3, help="peak learning rate, singular values apart")
    upper_learning_rate: float = HfArg(
        default=2e-2, help="peak learning rate of the singular values, which start at 0"
    )
    warmup_steps: float = HfArg(default=0.1, help="share of the steps in which rates rise")
    per_device_train_batch_size: int = HfArg(default=8, help="examples a batch, at each level")
    logging_steps: float = HfArg(default=10, help="steps from one log to the next")
    save_strategy: str = HfArg(default="no", help="when to write checkpoints")
    report_to: str | None = HfArg(default="none", help="trackers, such as tensorboard")
    seed: int = HfArg(default=0, help="of data, head, adapter, order and dropout")
    dataloader_drop_last: bool = HfArg(default=True, help="leave out an epoch's smaller last batch")


@dataclass
class Result:
    """One row of the table; ``log`` is the Trainer's."""

    method: str
    test_accuracy: float
    seconds: float
    log: list[dict[str, Any]]


def adapted(arguments: Arguments, data: TextData, seed: int) -> Any:
    """The pretrained model with a new head and a LoRA adapter; the same seed, the same start."""
    set_seed(seed)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.dropout,
        target_modules=["query", "value"],
        modules_to_save=["pooler", "classifier"],
    )
    return get_peft_model(load_model(arguments.model, data.label_names), config).train()


def train(
    method: str, arguments: Arguments, training: Training, data: TextData
) -> tuple[Any, Result]:
    """The trained model, and its row."""
    model = adapted(arguments, data, training.seed)
    if method == "bilora":
        use_pseudo_svd(model)
        lower = SingularVectors(model, gamma=arguments.gamma)
        upper = SingularValues(model)
    else:
        lower, upper = Adapter(model), None
    trainer = BilevelTrainer(
        model,
        lower=lower,
        upper=upper,
        args=training,
        train_dataset=data.train,
        data_collator=data.collate,
    )
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    true = torch.tensor(data.test["labels"])
    accuracy = float((logits_of(model, data).argmax(1) == true).double().mean())
    return model, Result(method, accuracy, seconds, trainer.state.log_history)


def main() -> None:
    """Train both, test, save and reload."""
    arguments, training = HfArgumentParser((Arguments, Training)).parse_args_into_dataclasses()
    if arguments.quick:
        arguments = replace(arguments, train_size=100, test_size=200)
        training.max_steps, training.logging_steps = 12, 4
    quiet()
    sizes = arguments.train_size, arguments.test_size, arguments.max_length
    data = load_data(arguments.dataset, arguments.model, *sizes, training.seed)
    print(f"{len(data.train)} training and {len(data.test)} test examples, {data.label_names}")

    results = []
    for method in ("lora", "bilora"):
        model, result = train(method, arguments, training, data)
        results.append(result)
    output = Path(training.output_dir)
    reload(model, arguments.model, data, output / "adapter")
    values = torch.cat([v.detach() for v in pseudo_singular_values(model).values()]).abs()
    print(f"|λ|: mean {values.mean():.3f}, least {values.min():.3f}, largest {values.max():.3f}")
    record = {
        "arguments": asdict(arguments),
        "training": training.bilevel_settings() | {"learning_rate": training.learning_rate},
        "results": [asdict(result) for result in results],
    }
    (output / "results.json").write_text(json.dumps(record, indent=1))
    print("\n| method | test accuracy | seconds |\n| --- | --- | --- |")
    for row in results:
        print(f"| {row.method} | {row.test_accuracy:.4f} | {row.seconds:.0f} |")


if __name__ == "__main__":
    main()
