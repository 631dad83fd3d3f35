"""Search a rank for each LoRA layer of a pretrained encoder, and compare with one rank for all.

    python examples/rank_selection.py            # MiniLM and tweets, no network
    python examples/rank_selection.py --quick    # the same, smaller

The search weighs the components of an adapter of rank ``--rank`` on half of the examples while the
other half trains it (AutoLoRA, arXiv:2403.09113). Then four adapters are trained on all examples
with PEFT and Trainer alone, from one head and one seed: the ranks found, the same ranks dealt out
to the layers at random, and one rank for all that takes no fewer parameters, for as many steps and
for as many as search and training have together. ``--warm`` adds one that starts from the search.
"""

from __future__ import annotations

import json
import math
import os
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Read when torch is imported: threads that spin while they wait take the core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from sklearn.metrics import accuracy_score, f1_score
from text_data import TextData, load_data, load_model, quiet
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments
from hyperopt_peft.adapters import (
    add_selection,
    component_weights,
    rank_config,
    selected_ranks,
    selected_state,
)
from hyperopt_peft.problems.rank_selection import Components, Selection


@dataclass
class Arguments:
    """What to search, on what, and where to write."""

    model: str = HfArg(default="minilm", help="minilm (its package), a folder, or a hub name")
    dataset: str = HfArg(default="tweets", help="tweets (its package), a folder, or a hub name")
    train_size: int = HfArg(default=500, help="training examples, for both levels together")
    test_size: int = HfArg(default=1000, help="test examples at most")
    max_length: int = HfArg(default=64, help="tokens an example")
    target_modules: list[str] = HfArg(
        default_factory=lambda: ["query", "value"], help="modules to adapt"
    )
    rank: int = HfArg(default=8, help="components a layer in the search")
    alpha: int = HfArg(default=16, help="LoRA's alpha in the search; the scale is alpha / rank")
    form: str = HfArg(default="softmax", help="softmax, as AutoLoRA has it, or sigmoid")
    decay: float = HfArg(default=0.0, help="the lower level's decay of A and B")
    threshold: float = HfArg(default=1.0, help="of a component's weight, which begins at 1")
    search_steps: int = HfArg(default=120, help="lower steps of the search")
    steps: int = HfArg(default=120, help="steps of the trainings after it")
    batch_size: int = HfArg(default=16, help="examples a batch, at each level")
    learning_rate: float = HfArg(default=2e-3, help="peak of the adapters' learning rate")
    upper_learning_rate: float = HfArg(default=5e-2, help="that of the weights' logits")
    hypergradient: str = HfArg(default="darts:scheme=forward", help="estimator")
    warm: bool = HfArg(default=False, help="also train from the components that the search found")
    seed: int = HfArg(default=0, help="of data, head, A, order and dropout")
    output_dir: str = HfArg(default="outputs/ranks", help="where results and adapter are written")
    quick: bool = HfArg(default=False, help="120 training and 100 test examples, 10 steps of 8")


def settings(arguments: Arguments, name: str, steps: int, **options: Any) -> dict[str, Any]:
    """What every training has in common."""
    return {
        "output_dir": str(Path(arguments.output_dir) / name),
        "max_steps": steps,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": 64,
        "learning_rate": arguments.learning_rate,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": arguments.seed,
        **options,
    }


def adapted(arguments: Arguments, data: TextData, config: LoraConfig) -> PeftModel:
    """The pretrained model with a new head, the same for every config, and a new adapter."""
    set_seed(arguments.seed)
    return get_peft_model(load_model(arguments.model, data.label_names), config)


def search(arguments: Arguments, data: TextData) -> tuple[PeftModel, dict[str, int]]:
    """The searched model and the rank of each layer."""
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_dropout=0.1,
        target_modules=arguments.target_modules,
        modules_to_save=["pooler", "classifier"],
    )
    model = add_selection(adapted(arguments, data, config), arguments.form)
    options = settings(
        arguments,
        "search",
        arguments.search_steps,
        lower_steps=2,
        upper_fraction=0.5,
        upper_learning_rate=arguments.upper_learning_rate,
        hypergradient=arguments.hypergradient,
    )
    trainer = BilevelTrainer(
        model,
        lower=Components(model, decay=arguments.decay),
        upper=Selection(model),
        args=BilevelTrainingArguments(**options),
        train_dataset=data.train,
        data_collator=data.collate,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model, selected_ranks(model, arguments.threshold)


def train(
    arguments: Arguments, data: TextData, name: str, model: PeftModel, steps: int
) -> dict[str, Any]:
    """Train ``model``, an adapter that only PEFT and Trainer know, and test it."""
    args = TrainingArguments(**settings(arguments, name.replace(" ", "_"), steps))
    trainer = Trainer(model, args, train_dataset=data.train, data_collator=data.collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    output = trainer.predict(data.test)
    predicted = output.predictions.argmax(1)
    adapter = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    return {
        "method": name,
        "steps": steps,
        "adapter_parameters": adapter,
        "test_accuracy": float(accuracy_score(output.label_ids, predicted)),
        "macro_f1": float(f1_score(output.label_ids, predicted, average="macro")),
    }


def main() -> None:
    """Search, train, compare, write."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.quick:
        small = {"train_size": 120, "test_size": 100, "batch_size": 8}
        arguments = replace(arguments, **small, search_steps=10, steps=10)
    quiet()
    sizes = arguments.train_size, arguments.test_size, arguments.max_length
    data = load_data(arguments.dataset, arguments.model, *sizes, arguments.seed)

    searched, found = search(arguments, data)
    for name, part in component_weights(searched).items():
        weights = " ".join(f"{float(alpha):.3f}" for alpha in part.weights().flatten())
        print(f"{name}: rank {found[name]} of weights {weights}")
    uniform = dict.fromkeys(found, math.ceil(sum(found.values()) / len(found)))
    dealt = list(found.values())
    random.Random(arguments.seed).shuffle(dealt)
    both = arguments.search_steps + arguments.steps
    plans = {
        "selected ranks": (found, arguments.steps),
        "the same, shuffled": (dict(zip(found, dealt, strict=True)), arguments.steps),
        "uniform rank": (uniform, arguments.steps),
        "uniform rank, longer": (uniform, both),
    }
    if arguments.warm:
        plans["selected, warm"] = (found, arguments.steps)
    print("\n| adapter | steps | adapter parameters | test accuracy | macro-F1 |")
    print("| --- | --- | --- | --- | --- |")
    rows = []
    for name, (ranks, steps) in plans.items():
        model = adapted(arguments, data, rank_config(searched, ranks))
        if name == "selected, warm":
            set_peft_model_state_dict(model, selected_state(searched, ranks))
        row = train(arguments, data, name, model, steps)
        if name == "selected ranks":
            model.save_pretrained(Path(arguments.output_dir) / "adapter")
        rows.append(row)
        print(
            f"| {name} | {steps} | {row['adapter_parameters']:,} "
            f"| {row['test_accuracy']:.4f} | {row['macro_f1']:.4f} |",
            flush=True,
        )
    results = {"arguments": asdict(arguments), "ranks": found, "uniform": uniform, "results": rows}
    Path(arguments.output_dir, "results.json").write_text(json.dumps(results, indent=1))
    print(f"\nresults and adapter are in {arguments.output_dir}")


if __name__ == "__main__":
    main()
