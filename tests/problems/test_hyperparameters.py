"""Decays, scales and the learning rate of an adapter: exact hypergradients, a stock adapter."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from hyperopt_peft import BilevelTrainer, Engine, ProblemError, hypergradient
from hyperopt_peft.adapters import (
    add_hyperparameters,
    fold_scales,
    layer_hyperparameters,
    lora_layers,
)
from hyperopt_peft.problems.hyperparameters import Hyperparameters, Regularised
from tests.support.trainers import arguments, base_model, data, peft_model


class Sum(nn.Module):
    """y = first(x) + second(z), with the mean square as its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor, z: Any, y: Any) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.first(x) + self.second(z) - y).square().mean())


def examples(count: int) -> Any:
    return dict(zip("xzy", (torch.randn(count, n, dtype=torch.float64) for n in (5, 5, 3))))


def program(rate: Any = None, **level: Any) -> tuple[Any, ...]:
    """Levels in float64, away from any minimum and from the scales and decays of the start."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["first", "second"])
    model = add_hyperparameters(get_peft_model(Sum().double(), config), decay=0.2)
    upper = Hyperparameters(model, learning_rate=rate, data=[examples(8)])
    lower = Regularised(model, upper, data=[examples(8)], **level)
    with torch.no_grad():
        for p in (*lower.variables, *upper.variables[:4]):
            p += 0.5 * torch.randn_like(p)
    return model, upper, lower


def flat(parts: Any, like: Any) -> Any:
    filled = (torch.zeros_like(x) if p is None else p for p, x in zip(parts, like, strict=True))
    return torch.cat([p.flatten() for p in filled])


def bert(dropout: float = 0.0) -> Any:
    return add_hyperparameters(peft_model(dropout=dropout, dora=False))


def test_levels_share_out_the_trainable_parameters() -> None:
    model = bert()
    upper = Hyperparameters(model, learning_rate=1e-3)
    lower = Regularised(model, upper)
    trainable = {id(p) for p in model.parameters() if p.requires_grad} | {id(upper.log_rate)}
    assert {id(p) for p in (*upper.variables, *lower.variables)} == trainable
    assert len(upper.variables) + len(lower.variables) == len(trainable)
    assert len(upper.variables) == 2 * len(lora_layers(model)) + 1 == 13
    values = upper.values()
    assert values["learning_rate"] == pytest.approx(1e-3)
    assert {v for n, v in values.items() if n.endswith(".scale")} == {1.0}
    assert [v for n, v in values.items() if n.endswith(".decay")] == pytest.approx([1e-2] * 6)


def test_at_the_start_the_adapter_is_plain_lora() -> None:
    ids = torch.tensor(data()["input_ids"])
    assert torch.equal(bert()(ids).logits, peft_model(dropout=0.0, dora=False)(ids).logits)


def test_the_lower_loss_decays_each_layer_by_its_own_weight() -> None:
    model, upper, lower = program()
    batch = lower.peek_batch()
    loss, metrics = lower.evaluate(batch)
    expected = model(**batch).loss
    for name, layer in lora_layers(model):
        factors = (layer.lora_A.default.weight, layer.lora_B.default.parametrizations.weight)
        squares = factors[0].square().sum() + factors[1].original.square().sum()
        expected = expected + upper.values()[f"{name}.decay"] / 2 * squares
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    assert metrics["task_loss"] == model(**batch).loss.item()


def test_a_head_has_no_decay() -> None:
    model = bert()
    level = Regularised(model, Hyperparameters(model))
    batch = data().with_format("torch")[:8]
    (loss, metrics), decays = level.evaluate(batch), layer_hyperparameters(model)
    factors = [p for n, p in zip(level.names, level.variables, strict=True) if "lora_" in n]
    assert len(factors) == 2 * len(decays) < len(level.variables)
    squares = sum(p.square().sum().item() for p in factors)
    assert loss.item() == pytest.approx(metrics["task_loss"] + 0.01 / 2 * squares, rel=1e-5)


def test_implicit_hypergradients_are_those_of_autograd() -> None:
    """∂F/∂u − ∂²f/∂u∂w H⁻¹ ∂F/∂w, written out; damping keeps H away from singular."""
    _, upper, lower = program()
    w, u = lower.variables, upper.variables
    f, big_f = lower.evaluate(lower.peek_batch())[0], upper.evaluate(upper.peek_batch())[0]
    slope = flat(grad(f, w, create_graph=True), w)
    hessian = torch.stack([flat(grad(s, w, retain_graph=True), w) for s in slope])
    above = grad(big_f, (*w, *u), allow_unused=True)
    v = torch.linalg.solve(hessian, flat(above[: len(w)], w))
    mixed = flat(grad(slope @ v, u), u)
    expected = flat(above[len(w) :], u) - mixed
    found = flat(hypergradient(upper, lower, "exact"), u)
    assert (mixed != 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["unrolled", "forward"])
def test_hypergradients_through_the_steps_are_those_of_autograd(method: str) -> None:
    """Three steps of gradient descent with momentum at the learnt rate, as one graph."""
    model, upper, lower = program(rate=0.03)
    lower.optimizer = torch.optim.SGD(lower.variables, lr=9.0, momentum=0.5)
    upper.optimizer = torch.optim.SGD(upper.variables, lr=1.0)
    w, u = dict(zip(lower.names, lower.variables)), upper.variables
    before, velocity = flat(u, u).detach(), None
    layers = layer_hyperparameters(model)
    for _ in range(3):
        loss = functional_call(model, w, (), lower.peek_batch()).loss
        for name, p in w.items():
            layer = layers[name.partition(".lora_")[0]]
            loss = loss + layer.log_decay.exp().sum() / 2 * p.square().sum()
        g = grad(loss, list(w.values()), create_graph=True)
        velocity = g if velocity is None else [v / 2 + d for v, d in zip(velocity, g)]
        w = {n: p - upper.log_rate.exp() * v for (n, p), v in zip(w.items(), velocity)}
    expected = flat(grad(functional_call(model, w, (), upper.peek_batch()).loss, u), u)
    assert (expected != 0).all()

    Engine(upper, lower, f"{method}:steps=3", lower_steps=3, progress=False).run(1)
    found = before - flat(u, u).detach()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    here = flat(lower.variables, lower.variables)
    torch.testing.assert_close(here, flat(w.values(), w.values()), rtol=1e-12, atol=1e-12)


def collate(rows: int) -> dict[str, Any]:
    return {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in "xzy"}


def trainer(folder: Path, rate: Any = None) -> tuple[Any, ...]:
    model, upper, lower = program(rate)
    below, above = (level.batches.peek() for level in (lower, upper))
    lower.batches = upper.batches = None
    settings = {
        "max_steps": 3,
        "lower_steps": 1,
        "per_device_train_batch_size": 8,
        "hypergradient": "darts:product=exact",
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.05,
        "upper_learning_rate": 1e-4,
        "max_grad_norm": 0.0,
        "upper_max_grad_norm": 0.0,
        "remove_unused_columns": False,
    }
    train, validation = (
        Dataset.from_dict({k: v.tolist() for k, v in rows.items()}) for rows in (below, above)
    )
    made = BilevelTrainer(
        model,
        lower=lower,
        upper=upper,
        args=arguments(folder, **settings),
        train_dataset=train,
        upper_dataset=validation,
        data_collator=collate,
    )
    return made, below, above


def test_every_step_of_the_trainer_is_that_of_its_own_gradients(tmp_path: Path) -> None:
    made, below, above = trainer(tmp_path)
    w, u = made.lower.variables, made.upper.variables
    start = [p.detach().clone() for p in (*w, *u)]
    for _ in range(3):  # by plain autograd
        f, big_f = made.lower.evaluate(below)[0], made.upper.evaluate(above)[0]
        slope = grad(f, w, create_graph=True)
        of_w = grad(big_f, w, retain_graph=True)
        direct = grad(big_f, u, allow_unused=True, materialize_grads=True)
        mixed = grad(slope, u, grad_outputs=of_w)
        with torch.no_grad():
            for x, g in zip(w, slope):
                x -= 0.05 * g
            for x, d, i in zip(u, direct, mixed):
                x -= 1e-4 * (d - i)
    expected = [p.detach().clone() for p in (*w, *u)]
    with torch.no_grad():
        for p, value in zip((*w, *u), start):
            p.copy_(value)
    made.train()
    for found, value in zip((*w, *u), expected):
        torch.testing.assert_close(found.detach(), value, rtol=1e-10, atol=1e-12)


def test_the_trainer_refuses_to_learn_its_own_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="optimizer_options"):
        trainer(tmp_path, rate=0.1)


@pytest.mark.parametrize("method", ["forward:carry=true", "unrolled"])
def test_the_result_is_a_stock_adapter(method: str, tmp_path: Path) -> None:
    model = bert(dropout=0.1)
    rows = data().with_format("torch")
    upper = Hyperparameters(model, learning_rate=1e-2, data=[rows[:8], rows[8:16]])
    lower = Regularised(model, upper, data=[rows[16:]], max_grad_norm=1.0)
    lower.optimizer = torch.optim.AdamW(lower.variables, lr=1.0)
    upper.optimizer = torch.optim.Adam(upper.variables, lr=0.1)
    start = upper.values()
    Engine(upper, lower, method, progress=False).run(3)
    learnt = upper.values()
    assert all(learnt[name] != value for name, value in start.items())
    assert lower.optimizer.param_groups[0]["lr"] != 1e-2

    ids = torch.tensor(data()["input_ids"])
    logits = model.eval()(ids).logits
    fold_scales(model).save_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, logits)
    again = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert torch.equal(again(ids).logits, logits)
    stock = get_peft_model_state_dict(peft_model(dora=False))
    assert get_peft_model_state_dict(model).keys() == stock.keys()


def test_what_is_not_to_be_learnt_stays() -> None:
    model, _, _ = program()
    upper = Hyperparameters(model, learn=["decay"], learning_rate=0.1)
    assert [name.rpartition(".")[2] for name in upper.names] == ["decay", "decay", "learning_rate"]
    lower = Regularised(model, upper)
    assert len(lower.variables) == 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Hyperparameters(peft_model(dora=False)), "add_hyperparameters"),
        (lambda: fold_scales(peft_model(dora=False)), "add_hyperparameters"),
        (lambda: add_hyperparameters(bert()), "parametri[sz]ation"),
        (lambda: add_hyperparameters(peft_model(), decay=0.0), "decay: .*0.0"),
        (lambda: add_hyperparameters(base_model()), "peft_model: "),
        (lambda: Hyperparameters(bert(), learn=["rate"]), 'learn.*"decay".*"scale"'),
        (lambda: Hyperparameters(bert(), learning_rate=-1.0), "learning_rate"),
        (
            lambda: Hyperparameters(bert(), learning_rate=float("inf")),
            "learning_rate",
        ),
    ],
)
def test_bad_input_is_named(wrong: Callable[..., Any], said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        wrong()
