"""A rank for each LoRA layer, from weights of its rank-1 components learnt on validation data.

    python examples/methods/rank_selection.py            # MiniLM and tweets, no network
    python examples/methods/rank_selection.py --quick    # the same, smaller

A method in one file: a parametrisation of the adapter, two levels, what is made of the result, and
a comparison with the simplest alternatives. In each layer, with weights α of logits β,

    ΔW = s·Σ_j α_j B_{:,j} A_{j,:}

    upper: min over β       L(A*, B*, α(β); validation data)
    lower: A*, B*(β) = argmin over A, B, head   L(A, B, α(β); training data) + decay·½(‖A‖² + ‖B‖²)

Components with α_j below a threshold are removed, and an adapter with the remaining ranks is
trained anew on all data. With softmax and without decay this is AutoLoRA (Zhang et al. 2024,
arXiv:2403.09113). Without decay every positive α allows the same ΔW: at the lower minimum F does
not depend on α, which then moves only because the lower level is not at its minimum. With decay a
component of small α needs large factors, whose decay is costly.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Problem
from hyperopt_peft.adapters import lora_layers

PREFIX = "base_model.model."
Form = Literal["softmax", "sigmoid"]


class ComponentWeights(nn.Module):
    """A ↦ diag(α)·A for A of shape (r, …), with trainable ``logits`` β of shape (r, 1, …).

        softmax    α_j = r·exp β_j / Σ_i exp β_i    the mean over a layer is 1
        sigmoid    α_j = 2/(1 + exp(−β_j))          independent, between 0 and 2

    Both are 1 at β = 0, which is plain LoRA.
    """

    def __init__(self, a: Tensor, form: Form) -> None:
        super().__init__()
        self.form = form
        # As many dimensions as A: PEFT assumes that a flat parameter of lora_A is a broken A.
        self.logits = nn.Parameter(a.new_zeros(len(a), *[1] * (a.ndim - 1)))

    def weights(self) -> Tensor:
        """α, in the shape of ``logits``."""
        if self.form == "sigmoid":
            return 2 * self.logits.sigmoid()
        # Division by the mean makes equal weights exactly 1, and the largest at least 1.
        e = (self.logits - self.logits.detach().max()).exp()
        return e / e.mean()

    def forward(self, a: Tensor) -> Tensor:
        """diag(α)·A."""
        return self.weights() * a


def add_selection(model: PeftModel, form: Form = "softmax") -> PeftModel:
    """Make diag(α)·A of the A in every layer of the active adapter; PEFT does the rest."""
    for _, layer in lora_layers(model):
        a: Any = layer.lora_A[model.active_adapter]
        parametrize.register_parametrization(a, "weight", ComponentWeights(a.weight, form))
    return model


def component_weights(model: PeftModel) -> dict[str, ComponentWeights]:
    """The modules with the logits, by the layer's name in the base model."""
    return {
        name.removeprefix(PREFIX).partition(".lora_A.")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, ComponentWeights)
    }


class Components(Problem):
    """Lower level: min over A, B, head of L + decay·½(‖A‖² + ‖B‖²), A without α."""

    def __init__(self, model: Any, *, decay: float = 0.0, **level: Any) -> None:
        self.model, self.decay = model, decay
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        super().__init__([(n, p) for n, p in named if not n.endswith(".logits")], **level)

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """L + decay·½(‖A‖² + ‖B‖²); L is a metric too."""
        task = self.model(**batch).loss
        named = zip(self.names, self.variables, strict=True)
        squares = sum(p.square().sum() for name, p in named if ".lora_" in name)
        return {"loss": task + self.decay / 2 * squares, "task_loss": task}


class Selection(Problem):
    """Upper level: min over the logits β of L."""

    def __init__(self, model: Any, **level: Any) -> None:
        self.model = model
        named = [(n, p) for n, p in model.named_parameters() if n.endswith(".logits")]
        super().__init__(named, **level)

    def loss(self, batch: Any) -> Tensor:
        """L."""
        loss: Tensor = self.model(**batch).loss
        return loss


@torch.no_grad()
def selected_ranks(model: PeftModel, threshold: float = 1.0) -> dict[str, int]:
    """The number of weights ≥ ``threshold`` of each layer; 0 is possible with sigmoids only."""
    parts = component_weights(model).items()
    return {name: int((part.weights() >= threshold).sum()) for name, part in parts}


def rank_config(model: PeftModel, ranks: Mapping[str, int]) -> LoraConfig:
    """A stock config with these ranks and each layer's scale; rank 0 is no adapter."""
    layers = {name.removeprefix(PREFIX): layer for name, layer in lora_layers(model)}
    config = deepcopy(model.peft_config[model.active_adapter])
    config.target_modules = {name for name in layers if ranks[name]}
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name in config.target_modules:
        # PEFT matches a key, a regular expression, with the end of a name.
        key, divisor = f"^{re.escape(name)}", ranks[name] ** (0.5 if config.use_rslora else 1)
        config.rank_pattern[key] = ranks[name]
        config.alpha_pattern[key] = layers[name].scaling[model.active_adapter] * divisor
    return config


@dataclass
class Arguments:
    """What to search, on what, and where to write."""

    model: str = HfArg(default="minilm", help="minilm (its package), a folder, or a hub name")
    dataset: str = HfArg(default="tweets", help="tweets (its package), a folder, or a hub name")
    train_size: int = HfArg(default=500, help="training examples, for both levels together")
    test_size: int = HfArg(default=1000, help="test examples at most")
    max_length: int = HfArg(default=64, help="tokens an example")
    rank: int = HfArg(default=8, help="components a layer in the search; alpha is twice that")
    form: str = HfArg(default="softmax", help="softmax, as AutoLoRA has it, or sigmoid")
    decay: float = HfArg(default=0.0, help="the lower level's decay of A and B")
    threshold: float = HfArg(default=1.0, help="of a component's weight, which begins at 1")
    search_steps: int = HfArg(default=120, help="lower steps of the search")
    steps: int = HfArg(default=120, help="steps of the trainings after it")
    batch_size: int = HfArg(default=16, help="examples a batch, at each level")
    seed: int = HfArg(default=0, help="of data, head, A, order and dropout")
    output_dir: str = HfArg(default="outputs/ranks", help="where results and adapter are written")
    quick: bool = HfArg(default=False, help="120 training and 100 test examples, 10 steps of 8")


def main() -> None:
    """Search, train the selected ranks and the alternatives, print and write."""
    sys.path.append(str(Path(__file__).parents[1]))
    from text_data import load_data, load_model, quiet  # of the folder above

    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.quick:
        small = {"train_size": 120, "test_size": 100, "batch_size": 8}
        arguments = replace(arguments, **small, search_steps=10, steps=10)
    quiet()
    sizes = arguments.train_size, arguments.test_size, arguments.max_length
    data = load_data(arguments.dataset, arguments.model, *sizes, arguments.seed)

    def adapted(config: LoraConfig) -> PeftModel:
        set_seed(arguments.seed)  # the same head and order for every config
        return get_peft_model(load_model(arguments.model, data.label_names), config)

    common: dict[str, Any] = {
        "output_dir": arguments.output_dir,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": 64,
        "learning_rate": 2e-3,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": arguments.seed,
    }
    rows: dict[str, Any] = {"train_dataset": data.train, "data_collator": data.collate}

    config = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=0.1,
        target_modules=["query", "value"],
        modules_to_save=["pooler", "classifier"],
    )
    searched = add_selection(adapted(config), arguments.form)
    search = BilevelTrainingArguments(
        max_steps=arguments.search_steps,
        lower_steps=2,
        upper_fraction=0.5,
        upper_learning_rate=5e-2,
        hypergradient="darts:scheme=forward",
        **common,
    )
    upper, lower = Selection(searched), Components(searched, decay=arguments.decay)
    trainer: Trainer = BilevelTrainer(searched, upper=upper, lower=lower, args=search, **rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    ranks = selected_ranks(searched, arguments.threshold)
    for name, part in component_weights(searched).items():
        weights = " ".join(f"{alpha:.3f}" for alpha in part.weights().flatten().tolist())
        print(f"{name}: rank {ranks[name]} of weights {weights}")

    shuffled = list(ranks.values())
    random.Random(arguments.seed).shuffle(shuffled)
    uniform = dict.fromkeys(ranks, math.ceil(sum(ranks.values()) / len(ranks)))
    both = arguments.search_steps + arguments.steps
    plans = {
        "selected ranks": (ranks, arguments.steps),
        "the same, shuffled": (dict(zip(ranks, shuffled, strict=True)), arguments.steps),
        "uniform rank": (uniform, arguments.steps),
        "uniform rank, longer": (uniform, both),
    }
    print("\n| adapter | steps | adapter parameters | test accuracy |\n| --- | --- | --- | --- |")
    results = []
    for name, (plan, steps) in plans.items():
        model = adapted(rank_config(searched, plan))  # PEFT and Trainer alone from here
        trainer = Trainer(model, TrainingArguments(max_steps=steps, **common), **rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        output = trainer.predict(data.test)
        accuracy = float((output.predictions.argmax(1) == output.label_ids).mean())
        size = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        if name == "selected ranks":
            model.save_pretrained(Path(arguments.output_dir) / "adapter")
        results.append({"method": name, "steps": steps, "parameters": size, "accuracy": accuracy})
        print(f"| {name} | {steps} | {size:,} | {accuracy:.4f} |", flush=True)
    record = {"arguments": asdict(arguments), "ranks": ranks, "results": results}
    Path(arguments.output_dir, "results.json").write_text(json.dumps(record, indent=1))
    print(f"\nresults and adapter are in {arguments.output_dir}")


if __name__ == "__main__":
    main()
