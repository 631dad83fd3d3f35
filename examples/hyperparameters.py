"""Learn an adapter's decays, scales and learning rate while it is trained, from a poor start.

    python examples/hyperparameters.py            # MiniLM and tweets, no network
    python examples/hyperparameters.py --quick    # the same, smaller
    python examples/hyperparameters.py --learn rate --hypergradient forward:steps=2,carry=true

One half of the examples trains the adapter, the other one moves the hyper-parameters by the
gradient through the lower optimizer's steps: by default through one step, which judges a learning
rate by the next step alone; in the last command through the whole run so far. Then an adapter with
what was learnt is trained anew on all examples, beside adapters with fixed hyper-parameters: those
of the start, and a learning rate picked by hand.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Read when torch is imported: threads that spin while they wait take the core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.metrics import accuracy_score, f1_score
from text_data import TextData, load_data, load_model, logits_of, quiet
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hyperopt_peft import Engine, fit
from hyperopt_peft.adapters import add_hyperparameters, fold_scales, layer_hyperparameters
from hyperopt_peft.problems.hyperparameters import Hyperparameters, Regularised


@dataclass
class Arguments:
    """What to learn, on what, and where to write."""

    model: str = HfArg(default="minilm", help="minilm (its package), a folder, or a hub name")
    dataset: str = HfArg(default="tweets", help="tweets (its package), a folder, or a hub name")
    train_size: int = HfArg(default=500, help="training examples, for both levels together")
    test_size: int = HfArg(default=1000, help="test examples at most")
    max_length: int = HfArg(default=40, help="tokens an example")
    rank: int = HfArg(default=8, help="of the adapter on query and value; alpha is twice that")
    learn: list[str] = HfArg(
        default_factory=lambda: ["decay", "scale", "rate"], help="some of decay, scale and rate"
    )
    decay: float = HfArg(default=1e-3, help="where the decays start")
    learning_rate: float = HfArg(default=5e-5, help="where the learning rate starts")
    picked_rate: float = HfArg(default=2e-3, help="the learning rate picked by hand")
    upper_learning_rate: float = HfArg(default=0.1, help="of all of these's logarithms")
    hypergradient: str = HfArg(default="unrolled:steps=1", help="unrolled or forward")
    lower_steps: int = HfArg(default=2, help="lower steps between upper steps")
    steps: int = HfArg(default=120, help="lower steps of each training")
    batch_size: int = HfArg(default=8, help="examples a batch, at each level")
    seed: int = HfArg(default=0, help="of data, head, A, order and dropout")
    output_dir: str = HfArg(default="outputs/hyperparameters", help="where the results are written")
    quick: bool = HfArg(default=False, help="120 training and 100 test examples, 8 steps")


def levels(
    arguments: Arguments, data: TextData, rate: float, *, split: bool
) -> tuple[PeftModel, Hyperparameters, Regularised]:
    """A new adapter, the same for every call, and its levels, the lower one on half of the data."""
    set_seed(arguments.seed)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=0.1,
        target_modules=["query", "value"],
        modules_to_save=["pooler", "classifier"],
    )
    model = get_peft_model(load_model(arguments.model, data.label_names), config)
    add_hyperparameters(model, arguments.decay).train()
    train = validation = data.train
    if split:
        halves = data.train.train_test_split(0.5, seed=arguments.seed, stratify_by_column="labels")
        train, validation = halves["train"], halves["test"]
    upper, lower = (
        data.batches(part, arguments.batch_size, shuffle=True) for part in (validation, train)
    )
    above = Hyperparameters(
        model,
        learn=[kind for kind in arguments.learn if kind != "rate"],
        learning_rate=rate if "rate" in arguments.learn else None,
        data=upper,
    )
    below = Regularised(model, above, data=lower, max_grad_norm=1.0)
    below.optimizer = torch.optim.AdamW(below.variables, lr=rate, weight_decay=0.0)
    above.optimizer = torch.optim.Adam(above.variables, lr=arguments.upper_learning_rate)
    return model, above, below


def tested(arguments: Arguments, data: TextData, name: str, model: PeftModel) -> dict[str, object]:
    """Save the stock adapter, and test it."""
    fold_scales(model).save_pretrained(Path(arguments.output_dir) / name.replace(" ", "_"))
    predicted, labels = logits_of(model, data).argmax(1), data.test["labels"]
    scores = accuracy_score(labels, predicted), f1_score(labels, predicted, average="macro")
    print(f"| {name} | {scores[0]:.4f} | {scores[1]:.4f} |", flush=True)
    return {"method": name, "test_accuracy": scores[0], "macro_f1": scores[1]}


def main() -> None:
    """Learn, train, compare, write."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.quick:
        small = {"train_size": 120, "test_size": 100, "steps": 8}
        arguments = replace(arguments, **small)
    quiet()
    sizes = arguments.train_size, arguments.test_size, arguments.max_length
    data = load_data(arguments.dataset, arguments.model, *sizes, arguments.seed)

    start, steps = arguments.learning_rate, arguments.steps
    searched, upper, lower = levels(arguments, data, start, split=True)
    engine = Engine(
        upper,
        lower,
        arguments.hypergradient,
        lower_steps=arguments.lower_steps,
        seed=arguments.seed,
        progress=False,
    )
    path: list[dict[str, float]] = [upper.values()]
    engine.callbacks.append(lambda *_: path.append(upper.values()))
    engine.run(steps // arguments.lower_steps)
    learnt = upper.values()
    layers = {n: x.state_dict() for n, x in layer_hyperparameters(searched).items()}
    print("\n| learnt | at the start | on the way | at the end |\n| --- | --- | --- | --- |")
    for name in learnt:
        along = (f"{path[i][name]:.2e}" for i in (0, len(path) // 2, -1))
        print(f"| {name.removeprefix('base_model.model.')} | {' | '.join(along)} |")

    print("\n| hyper-parameters | test accuracy | macro-F1 |\n| --- | --- | --- |", flush=True)
    rows = [tested(arguments, data, "learnt, first training on one half", searched)]
    plans = {
        "learnt, trained anew": (learnt.get("learning_rate", start), layers),
        "of the start": (start, {}),
        "learning rate picked by hand": (arguments.picked_rate, {}),
    }
    for name, (rate, given) in plans.items():
        model, _, lower = levels(arguments, data, rate, split=False)
        for layer, state in given.items():
            layer_hyperparameters(model)[layer].load_state_dict(state)
        fit(lower, steps, progress=False)
        rows.append(tested(arguments, data, name, model))
    results = {"arguments": asdict(arguments), "path": path, "results": rows}
    Path(arguments.output_dir, "results.json").write_text(json.dumps(results, indent=1))
    print(f"\nresults and adapters are in {arguments.output_dir}")


if __name__ == "__main__":
    main()
