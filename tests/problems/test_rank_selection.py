"""Rank selection: who owns what, exact hypergradients, and the ranks of a known update."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.autograd import grad
from transformers import Trainer, TrainingArguments

from hyperopt_peft import (
    BilevelTrainer,
    Engine,
    ProblemError,
    hypergradient,
)
from hyperopt_peft.adapters import (
    add_selection,
    lora_layers,
    rank_config,
    selected_ranks,
    selected_state,
)
from hyperopt_peft.problems.rank_selection import Components, Selection
from tests.support.networks import differences
from tests.support.trainers import arguments, base_model, data, peft_model, values


class Sum(nn.Module):
    """y = first(x) + second(z), with the mean square as its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor, z: Any, y: Any) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.first(x) + self.second(z) - y).square().mean())


def examples(weights: Any, count: int, noise: Any) -> dict[str, Any]:
    x, z = torch.randn(2, count, 8, dtype=torch.float64)
    y = x @ weights[0].T + z @ weights[1].T
    return {"x": x, "z": z, "y": y + noise * torch.randn_like(y)}


def program(form: Any, seed: int, *, decay: float = 0.0, count: int = 60) -> tuple[Any, ...]:
    """Levels on data of W0 plus a rank-1 matrix of norm 2 in ``first``, nothing in ``second``."""
    torch.manual_seed(seed)
    base = Sum().double()
    u, v = (nn.functional.normalize(torch.randn(n, dtype=torch.float64), dim=0) for n in (6, 8))
    true = (base.first.weight.detach() + 2 * torch.outer(u, v), base.second.weight.detach().clone())
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["first", "second"])
    model = add_selection(get_peft_model(base, config), form)
    lower = Components(model, decay=decay, data=[examples(true, count, 0.5)])
    upper = Selection(model, data=[examples(true, count, 0.5)])
    return model, upper, lower


def bert(dropout: float = 0.1, form: str = "softmax") -> Any:
    return add_selection(peft_model(dropout=dropout, dora=False), form)


def test_levels_share_out_the_trainable_parameters() -> None:
    model = bert()
    lower, upper = Components(model), Selection(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(lower.names) | set(upper.names) == trainable
    assert not set(lower.names) & set(upper.names)
    assert len(upper.names) == len(lora_layers(model)) == 6
    assert all(name.endswith(".logits") for name in upper.names)
    assert any("classifier" in name for name in lower.names)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_the_engine_moves_both_levels_and_nothing_else(form: str) -> None:
    model = bert(form=form)
    rows = data().with_format("torch")
    batches = [rows[:8], rows[8:16]]
    lower, upper = Components(model, data=batches), Selection(model, data=batches[::-1])
    lower.optimizer = torch.optim.AdamW(lower.variables, lr=1e-2)
    upper.optimizer = torch.optim.AdamW(upper.variables, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Engine(upper, lower, "darts:scheme=forward", lower_steps=2, progress=False).run(3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {*lower.names, *upper.names}


def test_decay_is_half_the_squares_of_a_and_b() -> None:
    model, _, lower = program("softmax", 0, decay=0.3)
    batch = lower.peek_batch()
    squares = sum(p.square().sum() for p in lower.variables)
    loss, metrics = lower.evaluate(batch)
    assert metrics["task_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-12)
    assert loss.item() == pytest.approx(metrics["task_loss"] + 0.15 * squares.item(), rel=1e-12)


def test_a_head_has_no_decay() -> None:
    level = Components(bert(0.0), decay=0.3)
    loss, metrics = level.evaluate(data().with_format("torch")[:8])
    factors = [p for name, p in zip(level.names, level.variables) if "classifier" not in name]
    assert len(factors) == 2 * 6
    squares = sum(p.square().sum().item() for p in factors)
    assert loss.item() == pytest.approx(metrics["task_loss"] + 0.15 * squares, rel=1e-5)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_hypergradients_are_those_of_autograd(form: str) -> None:
    """−∂²f/∂β∂w H⁻¹ ∂F/∂w + ∂F/∂β, written out with plain autograd."""
    _, upper, lower = program(form, 0, decay=0.5)
    with torch.no_grad():
        for p in (*upper.variables, *lower.variables):
            p += 0.5 * torch.randn_like(p)
    w, beta = lower.variables, upper.variables

    def flat(parts: Any, like: Any) -> Any:
        filled = (torch.zeros_like(x) if p is None else p for p, x in zip(parts, like))
        return torch.cat([p.flatten() for p in filled])

    f, big_f = lower.evaluate(lower.peek_batch())[0], upper.evaluate(upper.peek_batch())[0]
    slope = flat(grad(f, w, create_graph=True), w)
    hessian = torch.stack([flat(grad(s, w, retain_graph=True), w) for s in slope])
    above = grad(big_f, (*w, *beta))
    v = torch.linalg.solve(hessian, flat(above[: len(w)], w))
    mixed = flat(grad(slope @ v, beta), beta)
    expected = flat(above[len(w) :], beta) - mixed
    assert mixed.norm() > 0.1 * expected.norm()

    found = hypergradient(upper, lower, "exact")
    torch.testing.assert_close(flat(found, beta), expected, rtol=1e-8, atol=1e-10)
    close = hypergradient(upper, lower, "minres:steps=400")
    torch.testing.assert_close(flat(close, beta), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_at_the_lower_minimum_only_decay_makes_the_weights_count(decay: float) -> None:
    _, upper, lower = program("softmax", 0, decay=decay)
    w = lower.variables
    with torch.no_grad():
        for p in (*upper.variables, *w):
            p += 0.3 * torch.randn_like(p)
    optimizer = torch.optim.LBFGS(
        w,
        max_iter=2000,
        history_size=50,
        tolerance_grad=1e-9,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Any:
        optimizer.zero_grad()
        loss = lower.evaluate(lower.peek_batch())[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    whole, direct = (
        torch.cat([p.flatten() for p in hypergradient(upper, lower, method)]).norm()
        for method in ("exact", "direct")
    )
    assert direct > 1e-3
    assert whole < 1e-5 * direct if decay == 0 else whole > 0.1 * direct


def search(form: Any, seed: int, decay: Any) -> Any:
    model, upper, lower = program(form, seed, decay=decay)
    lower.optimizer = torch.optim.Adam(lower.variables, lr=0.02)
    upper.optimizer = torch.optim.Adam(upper.variables, lr=0.1)
    engine = Engine(
        upper, lower, "darts:scheme=forward", lower_steps=3, warmup_steps=200, progress=False
    )
    engine.run(250)
    return model


@pytest.mark.parametrize("seed", [0, 5])
def test_the_search_finds_the_ranks_of_the_true_update(seed: int) -> None:
    model = search("sigmoid", seed, decay=0.03)
    assert selected_ranks(model, 0.5) == {"first": 1, "second": 0}
    assert list(rank_config(model, {"first": 1, "second": 0}).target_modules) == ["first"]


def test_a_softmax_finds_rank_one_and_never_none() -> None:
    assert selected_ranks(search("softmax", 0, decay=0.0)) == {"first": 1, "second": 1}


def collate(rows: int) -> dict[str, Any]:
    return {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in "xzy"}


@pytest.mark.parametrize("lower_steps", [1, 2])
def test_every_step_of_the_trainer_is_that_of_its_own_gradients(
    tmp_path: Path, lower_steps: int
) -> None:
    model, upper, lower = program("softmax", 0, decay=0.1, count=6)
    with torch.no_grad():
        for p in (*upper.variables, *lower.variables):
            p += 0.3 * torch.randn_like(p)
    below, above = lower.peek_batch(), upper.peek_batch()
    start = [p.detach().clone() for p in (*lower.variables, *upper.variables)]

    w, beta = lower.variables, upper.variables
    for step in range(1, 5):  # by plain autograd
        f, big_f = lower.evaluate(below)[0], upper.evaluate(above)[0]
        slope = grad(f, w, create_graph=True)
        of_w, of_beta = (grad(big_f, v, retain_graph=True) for v in (w, beta))
        mixed = grad(slope, beta, grad_outputs=of_w)
        with torch.no_grad():
            for x, g in zip(w, slope):
                x -= 0.05 * g
            if step % lower_steps == 0:
                for x, direct, implicit in zip(beta, of_beta, mixed):
                    x -= 0.2 * (direct - implicit)
    expected = [p.detach().clone() for p in (*w, *beta)]
    with torch.no_grad():
        for p, value in zip((*w, *beta), start):
            p.copy_(value)

    BilevelTrainer(
        model,
        lower=Components(model, decay=0.1),
        upper=Selection(model),
        args=arguments(
            tmp_path,
            max_steps=4,
            lower_steps=lower_steps,
            per_device_train_batch_size=6,
            hypergradient="darts:product=exact",
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=0.05,
            upper_learning_rate=0.2,
            max_grad_norm=0.0,
            upper_max_grad_norm=0.0,
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_dict({k: v.tolist() for k, v in below.items()}),
        upper_dataset=Dataset.from_dict({k: v.tolist() for k, v in above.items()}),
        data_collator=collate,
    ).train()
    for found, value in zip((*w, *beta), expected):
        torch.testing.assert_close(found.detach(), value, rtol=1e-10, atol=1e-12)


def trainer(folder: Path, **options: Any) -> BilevelTrainer:
    model = bert()
    return BilevelTrainer(
        model,
        lower=Components(model, decay=0.01),
        upper=Selection(model),
        args=arguments(folder, save_strategy="steps", save_steps=3, **options),
        train_dataset=data(),
    )


def test_a_search_resumes_bit_by_bit_and_ends_in_a_stock_adapter(tmp_path: Path) -> None:
    whole, resumed = trainer(tmp_path), trainer(tmp_path)
    start = values(whole.model)
    whole.train()
    assert all(not torch.equal(p, start[name]) for name, p in values(whole.model).items())
    assert {"lower_task_loss", "upper_loss"} <= whole.state.log_history[-2].keys()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not differences(values(whole.model), values(resumed.model))

    ranks = selected_ranks(whole.model)
    config = rank_config(whole.model, ranks)
    assert len(ranks) == 6 and 6 <= sum(ranks.values()) < 2 * 6
    retrained = get_peft_model(base_model(), config)
    set_peft_model_state_dict(retrained, selected_state(whole.model, ranks))
    plain = TrainingArguments(
        str(tmp_path / "plain"), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    Trainer(retrained, plain, train_dataset=data()).train()
    retrained.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base_model(), tmp_path / "adapter").eval()
    assert [x.r["default"] for _, x in lora_layers(again)] == list(ranks.values())
    ids = torch.tensor(data()["input_ids"])
    assert torch.equal(again(ids).logits, retrained.eval()(ids).logits)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Components(peft_model(dora=False)), "add_selection"),
        (lambda: Selection(peft_model(dora=False)), "add_selection"),
        (lambda: Selection(base_model()), "peft_model: "),
    ],
)
def test_bad_input_is_named(wrong: Callable[..., Any], said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        wrong()
