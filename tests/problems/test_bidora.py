"""BiDoRA: who owns what, what moves in which phase, and that the result is a PEFT adapter."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hyperopt_peft import Engine, ProblemError, compare_hypergradients, hypergradient
from hyperopt_peft.adapters import gram_penalty, set_norm_grad, split_parameters
from hyperopt_peft.problems.bidora import Direction, Magnitude
from hyperopt_peft.problems.common import Adapter
from tests.support.trainers import base_model


def dora_model(dropout: float = 0.1, **options: Any) -> Any:
    torch.manual_seed(0)
    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        lora_alpha=4,
        lora_dropout=dropout,
        target_modules=["query", "value", "intermediate.dense"],
        use_dora=True,
        **options,
    )
    return get_peft_model(base_model(dropout=dropout), adapter).train()


def batches(seed: int, count: int = 3, size: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(50, (size, 7), generator=generator),
            "labels": torch.randint(3, (size,), generator=generator),
        }
        for _ in range(count)
    ]


def engine(model: nn.Module, estimator: str = "darts:scheme=forward") -> Engine:
    """Both levels with AdamW, on batches of their own."""
    parts = split_parameters(model)
    lower = Direction(
        model,
        data=batches(1),
        optimizer=torch.optim.AdamW([*parts.directions.values(), *parts.rest.values()], lr=1e-2),
    )
    upper = Magnitude(
        model,
        data=batches(2),
        optimizer=torch.optim.AdamW(parts.magnitudes.values(), lr=1e-3, weight_decay=0.0),
    )
    return Engine(upper, lower, estimator, lower_steps=2, progress=False)


def values(parameters: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def moved(before: Any, after: Any) -> Any:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_levels_share_out_the_trainable_parameters() -> None:
    model = dora_model()
    lower, upper = Direction(model), Magnitude(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(lower.names) | set(upper.names) == trainable
    assert not set(lower.names) & set(upper.names)
    assert set(Adapter(model).names) == trainable
    assert all("magnitude" in name for name in upper.names)
    assert len(upper.names) == 2 * 3
    assert any("classifier" in name for name in lower.names)


def test_training_starts_at_the_pretrained_model() -> None:
    model, batch = dora_model(dropout=0.0), batches(4)[0]
    expected = base_model(dropout=0.0).train()
    expected.classifier.load_state_dict(
        {"weight": model.classifier.weight, "bias": model.classifier.bias}
    )
    for level in (Direction(model), Magnitude(model), Adapter(model)):
        torch.testing.assert_close(level.loss(batch), expected(**batch).loss)


def test_search_moves_both_levels_and_nothing_else() -> None:
    model = dora_model()
    before = values(dict(model.named_parameters()))
    parts = split_parameters(model)
    owned = {*parts.magnitudes, *parts.directions, *parts.rest}
    engine(model).run(3)
    assert moved(before, values(dict(model.named_parameters()))) == owned


def test_gamma_adds_the_gram_penalty() -> None:
    model, batch = dora_model(dropout=0.0), batches(4)[0]
    plain, regularised = Direction(model), Direction(model, gamma=0.3)
    loss, metrics = regularised.evaluate(batch)
    task, penalty = plain.evaluate(batch)[0], gram_penalty(model)
    torch.testing.assert_close(loss, task + 0.3 * penalty)
    assert metrics == pytest.approx({"task_loss": task.item(), "penalty": penalty.item()})


def levels(norm_grad: Any) -> tuple[Any, ...]:
    """Both levels in float64, away from the start, where B is no longer 0."""
    model = set_norm_grad(dora_model(dropout=0.0).double(), norm_grad)
    with torch.no_grad():
        for p in split_parameters(model).directions.values():
            p += 0.3 * torch.randn_like(p)
    lower_batch, upper_batch = batches(5, 1), batches(6, 1)
    return Magnitude(model, data=upper_batch), Direction(model, data=lower_batch)


def disagreement(norm_grad: Any) -> Any:
    """Relative difference between the finite-difference and the double-backward product."""
    rows = compare_hypergradients(
        *levels(norm_grad), ["darts"], "darts:product=exact", repeats=1
    ).rows
    return rows[0].relative_error


def test_only_a_norm_in_the_graph_makes_both_products_agree() -> None:
    assert disagreement("full") < 1e-6
    assert disagreement("detach") > 1e-2


def test_hypergradient_is_the_derivative_of_the_validation_loss_after_a_step() -> None:
    """ξ = lr: central differences of m ↦ F(w − lr·∂f/∂w(w, m), m), the formula's own definition."""
    upper, lower = levels("full")
    rate, h = 0.05, 1e-5
    start = [w.detach().clone() for w in lower.variables]
    m = upper.variables[0]

    def after_step() -> Any:
        gradient = lower.gradient(lower.peek_batch(), lower.variables).gradient
        with torch.no_grad():
            for w, w0, g in zip(lower.variables, start, gradient, strict=True):
                w.copy_(w0 - rate * g)
        value = upper.evaluate(upper.peek_batch())[0].item()
        with torch.no_grad():
            for w, w0 in zip(lower.variables, start, strict=True):
                w.copy_(w0)
        return value

    def shifted(delta: Any) -> Any:
        with torch.no_grad():
            m[0] += delta
        value = after_step()
        with torch.no_grad():
            m[0] -= delta
        return value

    numeric = (shifted(h) - shifted(-h)) / (2 * h)
    # In training the mixed product is taken at the start of the step, F at its end: the Engine
    # does one step of gradient descent and asks for the hypergradient there.
    optimizer = torch.optim.SGD(lower.variables, lr=rate)
    lower = Direction(lower.model, data=[lower.peek_batch()], optimizer=optimizer)
    upper = Magnitude(
        upper.model,
        data=[upper.peek_batch()],
        optimizer=torch.optim.SGD(upper.variables, lr=1.0),
    )
    before = m[0].item()
    Engine(upper, lower, "darts:xi=lr,product=exact", progress=False).run(1)
    assert before - m[0].item() == pytest.approx(numeric, rel=1e-5)


# The lower level is far from a minimum, where a few steps of a solver are a poor solve.
@pytest.mark.filterwarnings("ignore::hyperopt_peft.errors.HypergradientWarning")
def test_every_estimator_family_runs_on_it() -> None:
    upper, lower = levels("full")
    lower.optimizer = torch.optim.AdamW(lower.variables, lr=1e-3)
    for method in (
        "direct",
        "darts:scheme=forward",
        "cg:damping=1.0",
        "minres:steps=3",
        "unrolled",
    ):
        parts = hypergradient(upper, lower, method)
        assert [p.shape for p in parts] == [m.shape for m in upper.variables]
        assert all(p.isfinite().all() for p in parts)


def test_one_seed_is_one_result() -> None:
    runs = []
    for _ in range(2):
        model = dora_model()
        torch.manual_seed(5)
        engine(model).run(3)
        runs.append(values(dict(model.named_parameters())))
    assert not moved(*runs)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(ProblemError, match="PeftModel"):
        Direction(base_model())
