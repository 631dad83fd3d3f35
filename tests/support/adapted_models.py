"""Small models with a DoRA adapter on every layer type that PEFT supports."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

torch.set_num_threads(1)

#: By kind a layer, never square, so that a transposed weight cannot pass unnoticed, and the shape
#: of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 5), (2, 3, 4)),
    "conv1d_gpt2": (lambda: Conv1D(5, 4), (2, 3, 4)),
    "embedding": (lambda: nn.Embedding(7, 4), ()),
    "conv1d": (lambda: nn.Conv1d(4, 5, 3, padding=1), (2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 5, (3, 2), stride=2, padding=1), (2, 4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2), (2, 2, 3, 4, 3)),
}
KINDS = tuple(LAYERS)


class Single(nn.Module):
    """One layer, called ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def base_layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[kind][0]()
    if kind == "conv1d_gpt2":
        nn.init.normal_(layer.bias)
    return layer


def layer_input(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    if kind == "embedding":
        return torch.tensor([[0, 3, 3], [6, 1, 2]])
    return torch.randn(LAYERS[kind][1], dtype=torch.float64).to(dtype)


def wrap(module: nn.Module, **options: Any) -> PeftModel:
    """``module`` with an adapter on its ``layer``; DoRA of rank 2 unless told otherwise."""
    torch.manual_seed(2)
    config = {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["layer"]} | options
    return get_peft_model(module, LoraConfig(**config))


def single(
    kind: str = "linear", *, dtype: torch.dtype = torch.float64, **options: Any
) -> PeftModel:
    module = Single(base_layer(kind).to(dtype))
    return wrap(module, fan_in_fan_out=kind == "conv1d_gpt2", **options)


class Quantised(nn.Linear):
    """Stands for the quantised layers that subclass nn.Linear: a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class TwoLayers(nn.Module):
    """Layers of 12 and 11 inputs and outputs together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def two_layers(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    targets = ["first", "second"]
    model = wrap(TwoLayers().double(), use_dora=False, target_modules=targets, **options)
    return randomise(model)


def adapted_layer(model: nn.Module) -> LoraLayer:
    return next(module for module in model.modules() if isinstance(module, LoraLayer))


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if "lora_" in name)


def randomise(model: PeftModel, seed: int = 3) -> PeftModel:
    """Move A, B and m away from their initial values; m stays positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapter_parameters(model):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            if "magnitude" in name:
                p.mul_(1 + 0.3 * noise.clamp(-2, 2))
            else:
                p.add_(noise, alpha=0.5)
    return model


def bert(*, dtype: torch.dtype = torch.float64, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 20,
        "initializer_range": 0.2,
    }
    return BertForSequenceClassification(BertConfig(**(sizes | config))).to(dtype)


def dora_bert(**options: Any) -> PeftModel:
    """BERT with DoRA on query and value; the classifier is the trainable head."""
    defaults = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    return wrap(bert(), **(defaults | options))


def gpt2(**config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "n_positions": 20, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**(sizes | config))).double()


def token_ids() -> Tensor:
    torch.manual_seed(4)
    return torch.randint(3, 30, (3, 6))


def tokens(count: int, features: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, count, features, generator=generator, dtype=torch.float64).to(dtype)


def output_and_gradients(model: PeftModel, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """The output, and the gradients of a loss that weighs every output differently."""
    x = x.clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    y = y if isinstance(y, Tensor) else y.logits
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    model.zero_grad()
    (weights * y.sin()).sum().backward()
    found = {name: p.grad.clone() for name, p in adapter_parameters(model) if p.grad is not None}
    return {"output": y.detach()} | found | ({"input": x.grad} if x.requires_grad else {})


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (actual[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert error <= tolerance, (name, float(error))
