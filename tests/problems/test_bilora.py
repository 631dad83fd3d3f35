"""BiLoRA: the hypergradient, who moves what under either driver, and a plain PEFT adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import mse_loss

from hyperopt_peft import (
    BilevelTrainer,
    BilevelTrainingArguments,
    Engine,
    ProblemError,
    compare_hypergradients,
    hypergradient,
)
from hyperopt_peft.adapters import orthogonality_penalty, pseudo_singular_values, use_pseudo_svd
from hyperopt_peft.problems.bilora import SingularValues, SingularVectors
from tests.support.adapted_models import adapted_layer, layer_input, randomise, single
from tests.support.trainers import base_model, data, peft_model, values

GAMMA = 0.3


def model_of(dropout: float = 0.1, **options: Any) -> Any:
    return use_pseudo_svd(peft_model(dropout=dropout, dora=False, **options)).train()


def batches(seed: int, count: int = 2, size: int = 6) -> list[Any]:
    rows = data(rows=count * size, seed=seed).with_format("torch")
    return [rows[i * size : (i + 1) * size] for i in range(count)]


def engine(
    model: nn.Module,
    lower_lr: float = 1e-2,
    upper_lr: float = 1e-2,
    estimator: str = "darts:scheme=forward",
) -> Engine:
    lower = SingularVectors(model, gamma=GAMMA, data=batches(1))
    upper = SingularValues(model, data=batches(2))
    lower.optimizer = torch.optim.AdamW(lower.variables, lr=lower_lr)
    upper.optimizer = torch.optim.AdamW(upper.variables, lr=upper_lr, weight_decay=0.0)
    return Engine(upper, lower, estimator, lower_steps=2, progress=False)


def everything(model: nn.Module) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before: Any, model: nn.Module) -> Any:
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def test_levels_share_out_the_trainable_parameters() -> None:
    model = model_of()
    lower, upper = SingularVectors(model), SingularValues(model)
    assert set(upper.names) == set(pseudo_singular_values(model))
    assert [v.shape for v in upper.variables] == [(2,)] * 6  # three layers in each of two blocks
    assert not set(lower.names) & set(upper.names)
    assert set(lower.names) | set(upper.names) == set(values(model))
    assert sum("classifier" in name for name in lower.names) == 2


@pytest.mark.parametrize("gamma", [GAMMA, 1.0])
def test_gamma_adds_the_penalty(gamma: Any) -> None:
    model = model_of(dropout=0.0)
    with torch.no_grad():
        for variable in SingularVectors(model).variables:
            variable += 0.1
    batch = batches(3)[0]
    loss, metrics = SingularVectors(model, gamma=gamma).evaluate(batch)
    task, penalty = SingularValues(model).evaluate(batch)[0], orthogonality_penalty(model)
    without, logged = SingularVectors(model, gamma=0.0).evaluate(batch)
    assert torch.equal(without, task) and not logged
    torch.testing.assert_close(loss, task + gamma * penalty)
    assert metrics == pytest.approx({"task_loss": task.item(), "orthogonality": penalty.item()})
    assert penalty > 1e-2


def regression() -> tuple[Any, ...]:
    """One adapted linear layer in float64: the levels, and their losses written out by hand."""
    model = randomise(use_pseudo_svd(single("linear", use_dora=False)))
    layer = adapted_layer(model)
    base, x = layer.get_base_layer(), layer_input("linear")
    targets = torch.randn(2, 2, 3, 5, dtype=torch.float64)

    def task_loss(batch: Any) -> Any:
        return mse_loss(model(x), targets[batch])

    lower = SingularVectors(model, gamma=GAMMA, task_loss=task_loss, data=[0])
    upper = SingularValues(model, task_loss=task_loss, data=[1])
    b = layer.lora_B["default"].parametrizations.weight
    start = layer.lora_A["default"].weight, b.original0, b.original1
    assert [id(v) for v in (*lower.variables, *upper.variables)] == [id(v) for v in start]

    def task(w: Any, u: Any, batch: Any) -> Any:
        q, p = w[:8].view(2, 4), w[8:].view(5, 2)
        weight = base.weight + 3 / 2 * p @ torch.diag(u) @ q
        return (x @ weight.T + base.bias - targets[batch]).square().mean()

    def f(w: Any, u: Any) -> Any:
        q, p = w[:8].view(2, 4), w[8:].view(5, 2)
        identity = torch.eye(2, dtype=w.dtype)
        penalty = (p.T @ p - identity).square().sum() + (q @ q.T - identity).square().sum()
        return task(w, u, 0) + GAMMA * penalty

    w = torch.cat([v.detach().flatten() for v in lower.variables]).requires_grad_()
    u = upper.variables[0].detach().clone().requires_grad_()
    return upper, lower, f, lambda w, u: task(w, u, 1), w, u


def test_exact_hypergradient_is_the_implicit_function_theorem() -> None:
    upper, lower, f, upper_loss, w, u = regression()
    hessian = torch.autograd.functional.hessian(f, (w, u))
    above_w, above_u = torch.autograd.grad(upper_loss(w, u), (w, u))
    expected = above_u - hessian[1][0] @ torch.linalg.solve(hessian[0][0], above_w)
    torch.testing.assert_close(
        hypergradient(upper, lower, "exact")[0], expected, rtol=1e-9, atol=1e-12
    )


def test_search_step_is_autograd_through_the_lower_step() -> None:
    """ξ = lr: Λ moves along the derivative of F(w − lr·∂f/∂w(w, Λ), Λ)."""
    upper, lower, f, upper_loss, w, u = regression()
    rate = 0.05
    (gradient,) = torch.autograd.grad(f(w, u), w, create_graph=True)
    (expected,) = torch.autograd.grad(upper_loss(w - rate * gradient, u), u)
    lower.optimizer = torch.optim.SGD(lower.variables, lr=rate)
    upper.optimizer = torch.optim.SGD(upper.variables, lr=1.0)
    Engine(upper, lower, "darts:xi=lr,product=exact", progress=False).run(1)
    torch.testing.assert_close((u - upper.variables[0]).detach(), expected, rtol=1e-9, atol=1e-12)


def test_both_products_agree_on_a_whole_model() -> None:
    model = model_of(dropout=0.0).double()
    lower = SingularVectors(model, gamma=GAMMA, data=batches(1, 1))
    upper = SingularValues(model, data=batches(2, 1))
    rows = compare_hypergradients(upper, lower, ["darts"], "darts:product=exact", repeats=1).rows
    assert rows[0].relative_error < 1e-6


@pytest.mark.parametrize(
    "estimator", ["darts:scheme=forward", "cg:steps=2,damping=1.0", "unrolled"]
)
def test_a_search_moves_both_levels_and_nothing_else(estimator: str) -> None:
    model = model_of()
    before, trained = everything(model), set(values(model))
    engine(model, estimator=estimator).run(2)
    assert moved(before, model) == trained


@pytest.mark.parametrize("rates", [(1e-2, 0.0), (0.0, 1e-2)])
def test_each_level_moves_its_own(rates: Any) -> None:
    model = model_of()
    before, above = everything(model), set(pseudo_singular_values(model))
    engine(model, *rates).run(2)
    assert moved(before, model) == (above if rates[1] else set(values(model)) - above)


def test_a_new_adapter_leaves_its_start() -> None:
    """Λ = 0 and the penalty's minimum: the first upper step moves every λ."""
    model = model_of()
    with torch.no_grad():
        for v in pseudo_singular_values(model).values():
            v.zero_()
    engine(model).run(1)
    assert all((v != 0).all() for v in pseudo_singular_values(model).values())


def bilevel_trainer(
    folder: Path, model: nn.Module, upper_dataset: Any = None, **options: Any
) -> BilevelTrainer:
    settings = {
        "max_steps": 6,
        "lower_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "upper_learning_rate": 1e-2,
        "logging_steps": 2,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return BilevelTrainer(
        model,
        lower=SingularVectors(model, gamma=GAMMA),
        upper=SingularValues(model),
        args=BilevelTrainingArguments(output_dir=str(folder), **{**settings, **options}),
        train_dataset=data(rows=24 if upper_dataset is None else 3),
        upper_dataset=upper_dataset,
    )


def test_the_trainer_moves_both_levels_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    model = model_of()
    before, trained = everything(model), set(values(model))
    trainer = bilevel_trainer(tmp_path, model)
    trainer.train()
    assert moved(before, model) == trained
    logged = trainer.state.log_history[0].keys()
    assert {"upper_loss", "lower_task_loss", "lower_orthogonality"} <= logged

    # P and λ themselves, though the adapter's own file has their product only.
    again = model_of()
    bilevel_trainer(tmp_path, again).train(str(tmp_path / "checkpoint-4"))
    assert not moved(everything(model), again)


def test_the_trainer_takes_the_hypergradient_of_the_problems(tmp_path: Path) -> None:
    """One step with plain SGD: Λ has moved by −lr · hypergradient at the start."""
    model, above = model_of(dropout=0.0), data(rows=3, seed=1)
    trainer = bilevel_trainer(
        tmp_path,
        model,
        above,
        max_steps=1,
        lower_steps=1,
        hypergradient="darts:product=exact",
        optim="sgd",
        lr_scheduler_type="constant",
        upper_max_grad_norm=0.0,
        save_strategy="no",
    )
    lower = SingularVectors(model, gamma=GAMMA, data=[data(rows=3).with_format("torch")[:]])
    upper = SingularValues(model, data=[above.with_format("torch")[:]])
    before = [v.detach().clone() for v in upper.variables]
    expected = hypergradient(upper, lower, "darts:product=exact")
    trainer.train()
    for old, new, part in zip(before, upper.variables, expected):
        torch.testing.assert_close((old - new.detach()) / 1e-2, part, rtol=1e-3, atol=1e-6)


def test_stock_peft_loads_and_merges_a_checkpoint(tmp_path: Path) -> None:
    model = model_of()
    bilevel_trainer(tmp_path, model, max_steps=4).train()
    saved = load_file(tmp_path / "checkpoint-4/adapter_model.safetensors")
    assert {name.rpartition("lora_")[2] for name in saved if "lora_" in name} == {
        "A.weight",
        "B.weight",
    }
    ids = torch.tensor(data()["input_ids"][:])
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "checkpoint-4").eval()
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert torch.equal(plain(ids).logits, expected)
        merged = plain.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("level", [SingularVectors, SingularValues])
def test_bad_models_are_named(level: Any) -> None:
    with pytest.raises(ProblemError, match="peft_model: "):
        level(base_model())
    with pytest.raises(ProblemError, match="use_pseudo_svd"):
        level(peft_model(dora=False))
    with pytest.raises(ProblemError, match="use_pseudo_svd"):
        level(peft_model(dora=True))
