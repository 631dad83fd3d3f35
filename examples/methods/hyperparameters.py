"""Decays, scales and the learning rate of a LoRA adapter, learnt while the adapter is trained.

    python examples/methods/hyperparameters.py            # MiniLM and tweets, no network
    python examples/methods/hyperparameters.py --quick    # the same, smaller
    python examples/methods/hyperparameters.py --learn rate \
        --hypergradient forward:steps=2,carry=true

A method in one file: a parametrisation of the adapter, two levels, and a comparison with fixed
hyper-parameters. θ_l = (A_l, B_l) are the factors of layer l, whose update is
exp(s_l)·(α/r)·B_l·A_l:

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
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hyperopt_peft import Engine, Problem
from hyperopt_peft.adapters import lora_layers
from hyperopt_peft.engine import fit


class Scaled(nn.Module):
    """B ↦ exp(s)·B, with trainable s = 0 (``log_scale``) and d = log ``decay`` (``log_decay``)."""

    def __init__(self, b: Tensor, decay: float) -> None:
        super().__init__()
        shape = [1] * b.ndim  # PEFT assumes that a flat parameter of lora_B is a broken B
        self.log_scale = nn.Parameter(b.new_zeros(shape))
        self.log_decay = nn.Parameter(b.new_full(shape, math.log(decay)))

    def forward(self, b: Tensor) -> Tensor:
        """exp(s)·B."""
        return self.log_scale.exp() * b


def add_hyperparameters(model: PeftModel, decay: float = 1e-2) -> PeftModel:
    """Make exp(s)·B of the B in every layer of the active adapter; PEFT does the rest."""
    for _, layer in lora_layers(model):
        b: Any = layer.lora_B[model.active_adapter]
        parametrize.register_parametrization(b, "weight", Scaled(b.weight, decay))
    return model


def layer_hyperparameters(model: PeftModel) -> dict[str, Scaled]:
    """The modules with s and d, by the layer's name in the model."""
    named = model.named_modules()
    return {n.partition(".lora_B.")[0]: part for n, part in named if isinstance(part, Scaled)}


def fold_scales(model: PeftModel) -> PeftModel:
    """Replace each B by exp(s)·B and remove s and d: a stock adapter."""
    for _, layer in lora_layers(model):
        parametrize.remove_parametrizations(layer.lora_B[model.active_adapter], "weight")
    return model


class Hyperparameters(Problem):
    """Upper level: min over d, s and log η of L; ``learn`` is any of "decay", "scale", "rate"."""

    def __init__(
        self, model: PeftModel, learn: Collection[str], learning_rate: float, **level: Any
    ) -> None:
        self.model, layers = model, layer_hyperparameters(model)
        kinds = [kind for kind in learn if kind != "rate"]
        named = {f"{n}.{k}": getattr(x, f"log_{k}") for k in kinds for n, x in layers.items()}
        self.log_rate: Tensor | None = None
        if "rate" in learn:
            like = next(iter(layers.values())).log_scale
            self.log_rate = like.new_tensor(math.log(learning_rate)).requires_grad_()
            named["learning_rate"] = self.log_rate
        super().__init__(named, **level)

    def loss(self, batch: Any) -> Tensor:
        """L."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def values(self) -> dict[str, float]:
        """The current exp(d_l), exp(s_l) and η, by the names of the variables."""
        return {n: float(v.detach().exp()) for n, v in zip(self.names, self.variables, strict=True)}


class Regularised(Problem):
    """Lower level: min over A, B, head of L + ½ Σ_l exp(d_l)·‖θ_l‖²; its optimizer has rate η."""

    def __init__(self, model: Any, upper: Hyperparameters, **level: Any) -> None:
        self.model, self.upper, self.layers = model, upper, layer_hyperparameters(model)
        learnt = {id(p) for part in self.layers.values() for p in part.parameters()}
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        super().__init__([(n, p) for n, p in named if id(p) not in learnt], **level)

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """L + ½ Σ_l exp(d_l)·‖θ_l‖²; L is a metric too."""
        task = self.model(**batch).loss
        loss = task
        for name, variable in zip(self.names, self.variables, strict=True):
            layer, factor, _ = name.partition(".lora_")
            if factor:
                decay = self.layers[layer].log_decay.exp().sum()
                loss = loss + decay / 2 * variable.square().sum()
        return {"loss": loss, "task_loss": task}

    def optimizer_options(self) -> dict[str, Tensor]:
        """``{"lr": η}`` if η is learnt."""
        return {} if self.upper.log_rate is None else {"lr": self.upper.log_rate.exp()}


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


def main() -> None:
    """Learn on halves of the data, train anew on all, compare with fixed values, write."""
    sys.path.append(str(Path(__file__).parents[1]))
    from text_data import load_data, load_model, logits_of, quiet  # of the folder above

    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.quick:
        arguments = replace(arguments, train_size=120, test_size=100, steps=8)
    quiet()
    sizes = arguments.train_size, arguments.test_size, arguments.max_length
    data = load_data(arguments.dataset, arguments.model, *sizes, arguments.seed)

    def levels(
        rate: float, train: Any, validation: Any
    ) -> tuple[PeftModel, Hyperparameters, Regularised]:
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
        model = get_peft_model(load_model(arguments.model, data.label_names), config)
        add_hyperparameters(model, arguments.decay).train()
        batches = [data.batches(x, arguments.batch_size, shuffle=True) for x in (validation, train)]
        upper = Hyperparameters(model, arguments.learn, rate, data=batches[0])
        lower = Regularised(model, upper, data=batches[1], max_grad_norm=1.0)
        lower.optimizer = torch.optim.AdamW(lower.variables, lr=rate, weight_decay=0.0)
        upper.optimizer = torch.optim.Adam(upper.variables, lr=arguments.upper_learning_rate)
        return model, upper, lower

    def tested(name: str, model: PeftModel) -> dict[str, Any]:
        """Save the stock adapter, and test it."""
        fold_scales(model).save_pretrained(Path(arguments.output_dir) / name.replace(" ", "_"))
        labels = torch.tensor(data.test["labels"])
        accuracy = float((logits_of(model, data).argmax(1) == labels).double().mean())
        print(f"| {name} | {accuracy:.4f} |", flush=True)
        return {"method": name, "test_accuracy": accuracy}

    start, steps = arguments.learning_rate, arguments.steps
    halves = data.train.train_test_split(0.5, seed=arguments.seed, stratify_by_column="labels")
    searched, upper, lower = levels(start, halves["train"], halves["test"])
    options = {"lower_steps": arguments.lower_steps, "seed": arguments.seed, "progress": False}
    engine = Engine(upper, lower, arguments.hypergradient, **options)
    path: list[dict[str, float]] = [upper.values()]
    engine.callbacks.append(lambda *_: path.append(upper.values()))
    engine.run(steps // arguments.lower_steps)
    learnt = upper.values()
    layers = {n: x.state_dict() for n, x in layer_hyperparameters(searched).items()}
    print("\n| learnt | at the start | on the way | at the end |\n| --- | --- | --- | --- |")
    for name in learnt:
        along = (f"{path[i][name]:.2e}" for i in (0, len(path) // 2, -1))
        print(f"| {name.removeprefix('base_model.model.')} | {' | '.join(along)} |")

    print("\n| hyper-parameters | test accuracy |\n| --- | --- |", flush=True)
    rows = [tested("learnt, first training on one half", searched)]
    plans = {
        "learnt, trained anew": (learnt.get("learning_rate", start), layers),
        "of the start": (start, {}),
        "learning rate picked by hand": (arguments.picked_rate, {}),
    }
    for name, (rate, states) in plans.items():
        model, _, lower = levels(rate, data.train, data.train)
        for layer, state in states.items():
            layer_hyperparameters(model)[layer].load_state_dict(state)
        fit(lower, steps, progress=False)
        rows.append(tested(name, model))
    results = {"arguments": asdict(arguments), "path": path, "results": rows}
    Path(arguments.output_dir, "results.json").write_text(json.dumps(results, indent=1))
    print(f"\nresults and adapters are in {arguments.output_dir}")


if __name__ == "__main__":
    main()
