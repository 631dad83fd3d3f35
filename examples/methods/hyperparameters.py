"""Learns decays, scales and the learning rate of a LoRA adapter while the adapter is trained.

    python examples/methods/hyperparameters.py            # MiniLM and tweets, no network
    python examples/methods/hyperparameters.py --quick    # the same, smaller
    python examples/methods/hyperparameters.py --learn rate \
        --hypergradient forward:steps=2,carry=true

A method in one file: a parametrisation of the adapter, two levels, and a comparison with fixed
hyper-parameters. Layer l has factors θ_l = (A_l, B_l) and the update exp(s_l)·(α/r)·B_l·A_l:

    upper: min over d, s, η     L(θ*, s; validation data)
    lower: θ*(d, s, η) = the result of the optimizer at learning rate η for
                                L(θ, s; training data) + ½ Σ_l exp(d_l)·‖θ_l‖²

Every estimator, Engine and BilevelTrainer can learn d and s. η is an option of the optimizer
(`Problem.optimizer_options`): learning η requires Engine, no scheduler, and the estimator
"unrolled" or "forward". One step of "unrolled" judges a learning rate by the next step alone;
"forward" with "carry" differentiates the whole run so far.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hyperopt_peft import Engine, Method, Problem
from hyperopt_peft.adapters.gains import add_gains, gain_variables, gained_layers, remove_gains
from hyperopt_peft.engine import fit
from hyperopt_peft.utils.models import trainable
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg


@dataclass
class Hyperparameters(Method):
    """The upper level learns those of d, s and log η that ``learn`` names; the others are fixed."""

    learn: Collection[str] = ("decay", "scale", "rate")
    decay: float = 1e-2
    learning_rate: float = 1e-3

    def prepare(self, model: Any) -> None:
        """Replace B by exp(s)·B with s = 0, and create d and log η."""
        layers = add_gains(model, torch.exp, columns=False)
        like = layers[0].gain.u.detach()
        self.log_rate = like.new_tensor(math.log(self.learning_rate)).requires_grad_()
        self.log_decays = {
            each.name: like.new_tensor(math.log(self.decay)).requires_grad_() for each in layers
        }

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        """The learned variables by name; all are logarithms."""
        named: dict[str, Tensor] = {}
        if "decay" in self.learn:
            named |= {f"{name}.decay": d for name, d in self.log_decays.items()}
        if "scale" in self.learn:
            named |= gain_variables(model)
        return named | ({"learning_rate": self.log_rate} if "rate" in self.learn else {})

    def lower(self, model: Any, task_loss: Any) -> Problem:
        """The level `Regularised` over ``model``."""
        return Regularised(self, model, task_loss)

    def finish(self, model: Any) -> Any:
        """Fold exp(s) into B."""
        remove_gains(model)
        return model


class Regularised(Problem):
    """Lower level: min over A, B, head of L + ½ Σ_l exp(d_l)·‖θ_l‖²; its optimizer has rate η."""

    def __init__(self, method: Hyperparameters, model: Any, task_loss: Any) -> None:
        self.method, self.model, self.task_loss = method, model, task_loss
        gains = gain_variables(model).values()
        super().__init__(trainable(model, without=[*gains]))

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """L + ½ Σ_l exp(d_l)·‖θ_l‖², with L as a metric."""
        loss = task = self.task_loss(batch)
        for each in gained_layers(self.model):
            decay = self.method.log_decays[each.name].exp()
            loss = loss + decay / 2 * (each.a.square().sum() + each.b.square().sum())
        return {"loss": loss, "task_loss": task}

    def optimizer_options(self) -> dict[str, Tensor]:
        """``{"lr": η}`` if η is learnt."""
        return {"lr": self.method.log_rate.exp()} if "rate" in self.method.learn else {}


def values(level: Problem) -> dict[str, float]:
    """exp of the level's variables, by name."""
    named = zip(level.names, level.variables, strict=True)
    return {name: float(x.detach().exp()) for name, x in named}


@dataclass
class Arguments:
    """The learned hyper-parameters, the data and the training."""

    model: str = HfArg(default="minilm", help="minilm (its package), a folder, or a hub name")
    dataset: str = HfArg(default="tweets", help="tweets (its package), a folder, or a hub name")
    train_size: int = HfArg(default=500, help="training examples, for both levels together")
    test_size: int = HfArg(default=1000, help="test examples at most")
    max_length: int = HfArg(default=40, help="tokens an example")
    rank: int = HfArg(default=8, help="rank of the adapter on query and value; alpha is twice that")
    learn: list[str] = HfArg(
        default_factory=lambda: ["decay", "scale", "rate"], help="some of decay, scale and rate"
    )
    decay: float = HfArg(default=1e-3, help="initial value of the decays")
    learning_rate: float = HfArg(default=5e-5, help="initial value of the learning rate")
    picked_rate: float = HfArg(default=2e-3, help="learning rate picked by hand, for comparison")
    upper_learning_rate: float = HfArg(default=0.1, help="learning rate of all logarithms")
    hypergradient: str = HfArg(default="unrolled:steps=1", help="unrolled or forward")
    lower_steps: int = HfArg(default=2, help="lower steps between upper steps")
    steps: int = HfArg(default=120, help="lower steps of each training")
    batch_size: int = HfArg(default=8, help="examples a batch, at each level")
    seed: int = HfArg(default=0, help="seed of data, head, A, order and dropout")
    output_dir: str = HfArg(default="outputs/hyperparameters", help="where the results are written")
    quick: bool = HfArg(default=False, help="120 training and 100 test examples, 8 steps")


def main() -> None:
    """Learn on halves of the data, train anew on all of it, and compare with fixed values."""
    sys.path.append(str(Path(__file__).parents[1]))
    from text_data import load_data, load_model, logits_of, quiet  # from the folder above

    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.quick:
        arguments = replace(arguments, train_size=120, test_size=100, steps=8)
    quiet()
    sizes = arguments.train_size, arguments.test_size, arguments.max_length
    data = load_data(arguments.dataset, arguments.model, *sizes, arguments.seed)

    def levels(rate: float, train: Any, validation: Any) -> tuple[PeftModel, Problem, Problem]:
        """A new adapter, the same for every call, and its levels."""
        set_seed(arguments.seed)
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            lora_dropout=0.1,
            target_modules=["query", "value"],
            modules_to_save=["pooler", "classifier"],
        )
        model = get_peft_model(load_model(arguments.model, data.label_names), config).train()
        upper, lower = Hyperparameters(arguments.learn, arguments.decay, rate).levels(
            model,
            data=[data.batches(x, arguments.batch_size, shuffle=True) for x in (validation, train)],
            optimizers=[
                partial(torch.optim.Adam, lr=arguments.upper_learning_rate),
                partial(torch.optim.AdamW, lr=rate, weight_decay=0.0),
            ],
        )
        lower.max_grad_norm = 1.0
        return model, upper, lower

    def tested(name: str, model: PeftModel) -> dict[str, Any]:
        """Save the stock adapter, and test it."""
        remove_gains(model)
        model.save_pretrained(Path(arguments.output_dir) / name.replace(" ", "_"))
        labels = torch.tensor(data.test["labels"])
        accuracy = float((logits_of(model, data).argmax(1) == labels).double().mean())
        print(f"| {name} | {accuracy:.4f} |", flush=True)
        return {"method": name, "test_accuracy": accuracy}

    start, steps = arguments.learning_rate, arguments.steps
    halves = data.train.train_test_split(0.5, seed=arguments.seed, stratify_by_column="labels")
    searched, upper, lower = levels(start, halves["train"], halves["test"])
    options = {"lower_steps": arguments.lower_steps, "seed": arguments.seed, "progress": False}
    engine = Engine(upper, lower, arguments.hypergradient, **options)
    path: list[dict[str, float]] = [values(upper)]
    engine.callbacks.append(lambda *_: path.append(values(upper)))
    engine.run(steps // arguments.lower_steps)
    learnt = values(upper)
    print("\n| learnt | at the start | halfway | at the end |\n| --- | --- | --- | --- |")
    for name in learnt:
        along = (f"{path[i][name]:.2e}" for i in (0, len(path) // 2, -1))
        print(f"| {name} | {' | '.join(along)} |")

    print("\n| hyper-parameters | test accuracy |\n| --- | --- |", flush=True)
    rows = [tested("learnt, first training on one half", searched)]
    rates = {
        "learnt, trained anew": learnt.get("learning_rate", start),
        "initial values": start,
        "learning rate picked by hand": arguments.picked_rate,
    }
    for name, rate in rates.items():
        model, start_of, lower = levels(rate, data.train, data.train)
        if name == "learnt, trained anew":
            for new, old in zip(start_of.variables, upper.variables, strict=True):
                new.data.copy_(old)
        fit(lower, steps, progress=False)
        rows.append(tested(name, model))
    results = {"arguments": asdict(arguments), "path": path, "results": rows}
    Path(arguments.output_dir, "results.json").write_text(json.dumps(results, indent=1))
    print(f"\nresults and adapters are in {arguments.output_dir}")


if __name__ == "__main__":
    main()
