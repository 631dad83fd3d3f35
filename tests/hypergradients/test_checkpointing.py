"""With gradient checkpointing a hypergradient is bit for bit the one without, in half precision."""

from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from hyperopt_peft import Problem, hypergradient
from hyperopt_peft.core.labels import losses_of_logits
from hyperopt_peft.hypergradients import registered
from tests.support.language import fuse_head, language_model, lora
from tests.support.quadratic import FunctionLevel, flat

PROGRAMS = ("bidora", "mix")

#: Autocast inside the forward pass, autocast around the call, a base in bfloat16.
WAYS = ("inside", "around", "base")
FIRST_ORDER = (
    "direct",
    "darts",
    "darts:scheme=forward",
    "sama",
    "f2sa",
    "minres:steps=3,product=difference",
    "unrolled:product=difference",
)
METHODS = (
    *sorted({*registered()} - {*FIRST_ORDER, "fastmix"}),  # test_dots has the dot products
    "darts:product=exact",
    "sama:product=exact",
    "unrolled:steps=2",
    *FIRST_ORDER,
)
FAST = [
    ("bidora", "inside", "minres:steps=3", "logits"),
    ("bidora", "around", "darts", "logits"),
    ("bidora", "base", "f2sa", "logits"),
    ("mix", "inside", "darts:product=exact", "logits"),
    ("mix", "around", "unrolled:steps=2", "logits"),
    ("mix", "base", "sama", "logits"),
    *(("mix", way, "darts", "fused") for way in WAYS),
]
ALL = [
    *product(PROGRAMS, WAYS, METHODS, ["logits"]),
    *product(PROGRAMS, WAYS, FIRST_ORDER, ["fused"]),
]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FAST)]


def adapted(way: str, head: str, *, dora: bool, checkpointing: bool) -> Any:
    """A tiny Llama with an adapter; 48 unknowns without the magnitudes."""
    base = language_model()
    if head == "fused":
        fuse_head(base)
        trl = pytest.importorskip("trl")
        trl.models.enable_selective_activation_checkpointing(base)
    model = get_peft_model(base, lora(r=1, target_modules=["v_proj"], use_dora=dora))
    for name, parameter in model.named_parameters():
        if "lora_" not in name and way == "base":
            parameter.data = parameter.data.bfloat16()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 20, (4, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def levels(
    program: str, way: str, head: str = "logits", *, checkpointing: bool
) -> tuple[Problem, Problem, nn.Module]:
    """Magnitudes, or weights of four examples, above the adapter, with a convex term below."""
    model = adapted(way, head, dora=program == "bidora", checkpointing=checkpointing)
    weights = nn.Parameter(torch.zeros(4))

    def loss(batch: Any, weights: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if way == "inside" else nullcontext():
            if head == "fused":
                out = model(**batch, fused_lm_head=True, use_cache=False)
                losses = -out.log_probs
            else:
                out = model(**batch)
                losses, _ = losses_of_logits(model, out.logits, batch["labels"], shifted=True)
        shares = torch.ones(4) / 4 if weights is None else weights.softmax(0)
        return losses.mean(-1) @ shares

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    above: Any = [pair for pair in named if "magnitude" in pair[0]] or [("weights", weights)]
    below = [pair for pair in named if "magnitude" not in pair[0]]
    w = [p for _, p in below]

    def lower_loss(batch: Any) -> Tensor:
        data = loss(batch) if program == "bidora" else loss(batch, weights)
        return data + 50 * sum(p.square().sum() for p in w)

    optimizer = torch.optim.AdamW(w, lr=0.1)
    upper = FunctionLevel(loss, above, data=[batch(0)], name="above")
    return upper, FunctionLevel(lower_loss, below, data=[batch(1)], optimizer=optimizer), model


def estimated(
    program: str, way: str, method: str, head: str = "logits", *, checkpointing: bool
) -> tuple[Tensor, int]:
    """The hypergradient, and how often a block's forward pass began."""
    upper, lower, model = levels(program, way, head, checkpointing=checkpointing)
    calls: list[None] = []
    block = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn"))
    block.register_forward_pre_hook(lambda *_: calls.append(None))
    with torch.autocast("cpu", torch.bfloat16) if way == "around" else nullcontext():
        return flat(hypergradient(upper, lower, method, seed=0)), len(calls)


@pytest.mark.parametrize(("program", "way", "method", "head"), CASES)
def test_checkpointing_changes_no_bit(program: str, way: str, method: str, head: str) -> None:
    """TRL's head recomputes its logits in its backward pass; its checkpoints save the attention."""
    plain, once = estimated(program, way, method, head, checkpointing=False)
    actual, twice = estimated(program, way, method, head, checkpointing=True)
    assert torch.equal(actual, plain)
    reads_w = (program, method) != ("mix", "direct")
    assert plain.any() or not reads_w
    assert twice > once or method == "direct"


@pytest.mark.parametrize("head", ["logits", "fused"])
@pytest.mark.parametrize("way", ["inside", "around"])
def test_the_backward_passes_of_a_difference_are_in_single_precision(way: str, head: str) -> None:
    """The mixed product is that of a float32 model, but for the rounding of ∂F/∂w, of 1 %."""
    actual, expected = (
        estimated("bidora", name, "darts", head, checkpointing=True)[0]
        - estimated("bidora", name, "direct", head, checkpointing=True)[0]
        for name in (way, "float32")
    )
    assert (actual - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("way", WAYS)
def test_without_products_nothing_is_in_single_precision(way: str) -> None:
    upper, lower, model = levels("bidora", way, checkpointing=True)
    dtypes = set()
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _m, _i, logits: dtypes.add(logits.dtype))
    with torch.autocast("cpu", torch.bfloat16) if way == "around" else nullcontext():
        hypergradient(upper, lower, "direct")
    assert dtypes == {torch.bfloat16}
