"""Products by dot products: equal to exact ones, without a trace, and refused where wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, pad
from torch.optim import SGD, AdamW
from transformers.modeling_outputs import SequenceClassifierOutput

from hyperopt_peft import Engine, NonFiniteError, ProblemError, hypergradient
from hyperopt_peft.core.data import DataStream
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.task_level import TaskLevel
from hyperopt_peft.hypergradients import open_oracle
from hyperopt_peft.hypergradients.registry import get_estimator
from hyperopt_peft.utils.models import trainable
from tests.support import dots_in_processes, two_processes
from tests.support.networks import Interruption
from tests.support.quadratic import normal, relative_error
from tests.support.weighted_levels import Layers, sequences, weighted

ROWS = 12
#: By what weights are, the number of logits or hidden units.
KINDS = {"source": 3, "index": ROWS, "net": 4}


def levels(kind: str = "source", dropout: float = 0.0, **options: Any) -> tuple[Any, Any]:
    """Both levels, each with a batch, equal at every call."""
    upper, lower = weighted(kind, Layers(dropout), KINDS[kind], **options)
    upper.batches = DataStream([sequences(5, seed=2)], "upper")
    lower.batches = DataStream([sequences(ROWS, seed=1)], "lower")
    lower.optimizer = AdamW(lower.variables, lr=0.1, eps=1e-3)
    lower.max_grad_norm = 0.1
    return upper, lower


def gradient(levels: tuple[Any, Any], method: str) -> Tensor:
    return torch.cat([part.flatten() for part in hypergradient(*levels, method)])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", ["darts:xi=0.7", "sama:"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_equal_the_exact_product(kind: str, method: str, checkpointed: bool) -> None:
    """Of layers with and without bias, on tokens and on rows, with dropout, clipping, a prior."""
    both = levels(kind, dropout=0.3, **({} if kind == "net" else {"prior": 3.0}))
    both[1].model.checkpointed = checkpointed
    with torch.no_grad():
        for variable in both[1].variables:
            variable.add_(0.1)  # away from where the prior is 0
    dots, exact = (
        gradient(both, f"{method},product={p}".replace(":,", ":")) for p in ("dots", "exact")
    )
    torch.testing.assert_close(dots, exact, rtol=1e-11, atol=1e-13)


def test_in_training_they_are_taken_where_the_last_lower_step_began() -> None:
    moved = []
    for product in ("exact", "dots"):
        upper, lower = levels("index", dropout=0.3)
        upper.optimizer = SGD(upper.variables, lr=1.0)
        torch.manual_seed(5)
        engine = Engine(upper, lower, f"sama:product={product}", lower_steps=2, progress=False)
        history = engine.run(3)
        moved.append(upper.variables[0].detach())
        passes = history[-1]["gradients"], history[-1]["products"]
        assert passes == ((2, 0) if product == "dots" else (2, 1))
    torch.testing.assert_close(*moved, rtol=1e-10, atol=1e-12)


class Packed(WeightedRows):
    """Next-token losses of a causal network whose rows are packs of documents."""

    def losses(self, batch: Any) -> Tensor:
        ids, document = batch["ids"], batch["document"]
        alike = (document[:, :, None] == document[:, None]).tril().double()
        mixed = alike / alike.sum(-1, keepdim=True) @ self.model["value"](normal(9, 6)[ids])
        scores = self.model["head"](mixed.tanh()).mT[..., :-1]
        each = cross_entropy(scores, ids[:, 1:], reduction="none")
        each = each * (document[:, 1:] == document[:, :-1])  # the next document is not predicted
        return pad(each, (0, 1)).flatten()


@pytest.mark.parametrize("flat", [False, True])
def test_labels_have_the_weight_of_their_document(flat: bool) -> None:
    """In packs, and with all documents in one row."""
    generator = torch.Generator().manual_seed(1)
    batch = {
        "ids": torch.randint(9, (4, 8), generator=generator),
        "document": torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]] * 4) + 3 * torch.arange(4)[:, None],
        "source": torch.tensor([[0, 0, 0, 2, 2, 1, 1, 1], [1] * 8, [2] * 5 + [0] * 3, [0] * 8]),
    }
    if flat:
        batch = {name: column.view(1, -1) for name, column in batch.items()}
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    model = nn.ModuleDict({"value": nn.Linear(6, 6), "head": nn.Linear(6, 9)}).double()
    lower = Packed(model, lambda batch: logits.softmax(0)[batch["source"]])
    of_one = lambda b: Packed.losses(lower, b)[b["source"].flatten() == 1].sum()  # noqa: E731
    both = TaskLevel(model, {"logits": logits}, task_loss=of_one), lower
    results = [
        hypergradient(*both, f"darts:product={product}", upper_batch=batch, lower_batch=batch)[0]
        for product in ("exact", "dots")
    ]
    torch.testing.assert_close(*results, rtol=1e-11, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_fastmix_aligns_gradients_of_the_frozen_output_layer(tied: bool) -> None:
    """−ξ J ⟨∇_V F, ∇_V L_k⟩, with J = ∂v_k/∂u and V a weight that may be another layer's too."""
    upper, lower = levels()
    model, (logits,) = lower.model, upper.variables
    head = model.head
    if tied:  # its use elsewhere is no part of the gradient
        inner = nn.Linear(5, 3, bias=False).double()
        inner.weight = head.weight
        model.drop = nn.Sequential(nn.Linear(6, 5), inner, nn.Linear(3, 6)).double()
    head.requires_grad_(False)
    variables = trainable(model)
    lower.names, lower.variables = zip(*variables)
    slope = gradient((upper, lower), "fastmix:xi=0.5")

    def of_head(loss: Callable[[], Tensor]) -> Tensor:
        """The gradient of a copy of the weight that the output alone reads."""
        copy = head.weight.detach().clone().requires_grad_()
        hook = head.register_forward_hook(lambda _m, x, _y: linear(x[0], copy, head.bias))
        (slope,) = torch.autograd.grad(loss(), copy)
        hook.remove()
        return slope

    (target,), (mixture,) = upper.batches.data, lower.batches.data
    goal = of_head(lambda: upper.loss(target))
    aligned = torch.stack(
        [(goal * of_head(lambda k=k: lower.losses(mixture)[k])).sum() for k in range(ROWS)]
    )
    (expected,) = torch.autograd.grad(lower.weights(mixture), logits, -0.5 * aligned)
    torch.testing.assert_close(slope, expected, rtol=1e-11, atol=0)


def test_without_upper_variables_in_the_weights_they_are_zero() -> None:
    upper, lower = levels()
    lower.weighted = lambda losses, batch: {"loss": losses.sum()}
    assert not gradient((upper, lower), "darts:product=dots").any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision(dtype: torch.dtype) -> None:
    """Under autocast, with weights in float32. The loss says that there is no float32 pass."""
    exact = gradient(levels(), "darts:product=exact")
    both, seen = levels(), set()
    for variable in (*both[0].variables, *both[1].variables):
        variable.data = variable.data.float()
    for level in both:
        level.batches.data[0]["x"] = level.batches.data[0]["x"].float()
    both[1].model.head.register_forward_hook(lambda _m, _x, y: seen.add(y.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        actual = gradient(both, "darts:product=dots")
    assert relative_error(actual, exact) < (3e-2 if dtype == torch.bfloat16 else 1e-5)
    assert seen == {dtype}


@pytest.mark.parametrize("method", ["darts:product=dots", "sama:product=dots", "fastmix"])
@pytest.mark.parametrize("where", ["losses", "weighted", "backward", "upper", None])
def test_nothing_is_left_behind(method: str, where: str | None) -> None:
    upper, lower = levels(dropout=0.3)
    model = lower.model

    def fail(*_: Any) -> Any:
        raise Interruption

    if where == "backward":
        plain = lower.weighted

        def weighted(losses: Tensor, batch: Any) -> Any:
            losses.register_hook(fail)
            return plain(losses, batch)

        lower.weighted = weighted
    elif where == "upper":
        upper.loss = fail
    elif where:
        setattr(lower, where, fail)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [(p.clone(), p.grad, p.grad.clone()) for p in model.parameters()]
    random = torch.get_rng_state()
    if where:
        with pytest.raises(Interruption):
            hypergradient(upper, lower, method)
    else:
        assert gradient((upper, lower), method).any()
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    for parameter, (value, slope, copy) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is slope and torch.equal(slope, copy)


def embedded(lower: Any) -> None:
    lower.names, lower.variables = ("table",), (nn.Embedding(3, 4).weight,)


def outside(lower: Any) -> None:
    """A weight that the loss also uses without its layer."""
    plain = type(lower).losses
    weight = lower.model.head.weight
    lower.losses = lambda batch: plain(lower, batch) + 1e-2 * weight.square().sum()


def uncalled(lower: Any) -> None:
    model = lower.model

    def forward(x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = linear(model.hidden(x).mean(1), model.head.weight, model.head.bias)
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(logits=logits, loss=loss)

    model.forward = forward


def misshapen(lower: Any) -> None:
    """Layers that read the tokens of all rows on one axis."""
    hidden = lower.model.hidden
    lower.model.hidden = lambda x: hidden(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def headless(lower: Any) -> None:
    lower.model.get_output_embeddings = lambda: None


REFUSALS: list[tuple[str, Callable[[Any], None], str]] = [
    ("darts:product=dots", embedded, "'table'.*product=difference"),
    ("darts:product=dots", outside, "outside its layer.*product=difference"),
    ("darts:product=dots", uncalled, "'head.weight' without calling its layer"),
    ("darts:product=dots", misshapen, r"12 weights do not fit.*\(36, "),
    ("fastmix", headless, "get_output_embeddings"),
    ("fastmix", uncalled, "fused head"),
    ("minres:product=dots", uncalled, "minres: product"),
]


@pytest.mark.parametrize(("method", "spoil", "message"), REFUSALS)
def test_wrong_dots_are_refused(method: str, spoil: Callable[[Any], None], message: str) -> None:
    upper, lower = levels()
    spoil(lower)
    with pytest.raises(ProblemError, match=message):
        hypergradient(upper, lower, method)


@pytest.mark.parametrize("method", ["darts:product=dots", "fastmix"])
def test_a_level_must_weight_examples(method: str) -> None:
    upper, lower = levels()
    with pytest.raises(ProblemError, match="WeightedRows"):
        hypergradient(upper, TaskLevel(lower.model, lower.model.parameters()), method)


def test_not_a_number_is_reported_as_such() -> None:
    upper, lower = levels()
    lower.evaluate(lower.peek_batch())  # the first batch says which loss the model has
    lower.batches.data[0]["x"][0] = torch.nan
    with pytest.raises(NonFiniteError, match="loss is nan"):
        open_oracle(upper, lower).estimate(get_estimator("darts:product=dots"))


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Each with half of both batches; under FSDP2 the variables are shards, the weights whole."""
    kinds = ["ddp", "fsdp", "fsdp-half"]
    two = two_processes.run(dots_in_processes, tmp_path, *kinds)
    one = dots_in_processes.estimates("one")
    for kind in kinds:
        for method, expected in one.items():
            if (kind, method) == ("fsdp-half", "sama:product=dots"):
                continue  # Adam's first step follows signs, and its derivative rounding
            found = [process[kind][method] for process in two]
            assert torch.equal(*found)
            error = relative_error(found[0], expected)
            assert error < (5e-2 if kind == "fsdp-half" else 1e-12), (kind, method, error)
