"""Every method: its hypergradient, a special case, and a plain adapter at the end."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import default_data_collator

from hyperopt_peft import (
    BiDoRA,
    Engine,
    Method,
    ProblemError,
    compare_hypergradients,
)
from hyperopt_peft.adapters import gram_penalty, lora_layers
from hyperopt_peft.adapters.gains import squares
from hyperopt_peft.problems.autolora import AutoLoRA
from hyperopt_peft.problems.bidora import Direction
from hyperopt_peft.problems.bilora import BiLoRA, orthogonality
from hyperopt_peft.problems.class_offsets import ClassOffsets
from hyperopt_peft.problems.class_priors import FrequencyWeights, LogitAdjustment, TunedAdjustment
from hyperopt_peft.problems.layer_decay import LayerDecay
from hyperopt_peft.problems.layer_scales import LayerScales
from tests.support.adapted_models import (
    adapted_layer,
    layer_input,
    randomise,
    single,
    two_layers,
    wrap,
)
from tests.support.methods import method_trainer
from tests.support.resume import require_same_end
from tests.support.solved_levels import SGD, assign, flat
from tests.support.trainers import base_model, data, peft_model

METHODS: dict[str, Method] = {
    "bidora": BiDoRA(gamma=0.1),
    "bilora": BiLoRA(gamma=0.3),
    "autolora": AutoLoRA(decay=0.1),
    "layer_scales": LayerScales(decay=0.1),
    "layer_decay": LayerDecay(start=-2.0),
    "class_offsets": ClassOffsets(factor=True),
    "tuned_adjustment": TunedAdjustment(),
}


def model_of(name: str, **options: Any) -> Any:
    return peft_model(dora=name == "bidora", **options)


def two_batches() -> Any:
    """One for the upper and one for the lower level."""
    return [data(rows=9, seed=seed).with_format("torch")[:] for seed in (1, 2)]


@pytest.mark.parametrize("name", METHODS)
def test_hypergradient_is_the_central_difference_through_the_lower_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of F after three steps of gradient descent, in a random direction of the upper variables."""
    monkeypatch.setattr(METHODS[name], "after_upper_step", lambda: None)  # the step alone
    model, rows = model_of(name, dropout=0.0).double(), two_batches()
    ascent = partial(torch.optim.SGD, lr=1.0)
    batches = ([rows[0]], [rows[1]])
    METHODS[name].read_rows(model, data(rows=10), default_data_collator)
    upper, lower = METHODS[name].levels(model, data=batches, optimizers=[ascent, SGD])
    start, u = flat(lower.variables), flat(upper.variables)
    u += 0.1 * torch.randn_like(u)
    towards = torch.randn_like(u)

    def after_steps(shift: float) -> float:
        assign(lower, start)
        assign(upper, u + shift * towards)
        for _ in range(3):
            gradient = lower.gradient(rows[1], lower.variables).gradient
            assign(lower, flat(lower.variables) - 0.1 * flat(gradient))
        return float(upper.evaluate(rows[0])[0])

    numeric = (after_steps(1e-4) - after_steps(-1e-4)) / 2e-4
    assign(lower, start)
    assign(upper, u)
    Engine(upper, lower, "unrolled:steps=3", lower_steps=3, progress=False).run(1)
    moved = u - flat(upper.variables)
    assert float(moved @ towards) == pytest.approx(numeric, rel=1e-4)


@pytest.mark.parametrize("retrain", ["none", "warm", "scratch"])
@pytest.mark.parametrize("name", METHODS)
def test_stock_peft_loads_the_adapter(tmp_path: Path, name: str, retrain: str) -> None:
    settings = {"retrain": retrain, "hypergradient": "darts"}
    run = method_trainer(tmp_path, method=METHODS[name], model=model_of(name), **settings)
    before = flat(run.upper.variables)
    run.train()
    assert (flat(run.upper.variables) != before).all()
    assert not any("parametrizations" in name for name, _ in run.model.named_parameters())
    run.save_model()
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    rows = {"input_ids": torch.tensor(data()["input_ids"][:4])}
    expected = run.model.eval()(**rows).logits.detach()
    # BiDoRA's layers compute by other operations.
    torch.testing.assert_close(loaded(**rows).logits.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv1d_gpt2", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("new", [True, False])
def test_bilora_is_the_singular_value_decomposition(kind: str, new: bool) -> None:
    model, x, method = single(kind, use_dora=False), layer_input(kind), BiLoRA()
    if not new:
        randomise(model)
    layer = adapted_layer(model)
    a, b = (m["default"].weight.detach().flatten(1) for m in (layer.lora_A, layer.lora_B))
    expected, singular = model(x), torch.linalg.svdvals(b @ a)[:2]
    method.prepare(model)
    torch.testing.assert_close(model(x), expected)
    (values,) = method.upper_variables(model).values()
    torch.testing.assert_close(values.detach().flatten(), singular)
    assert float(orthogonality(model)) < 1e-25
    model(x).sin().sum().backward()
    assert (values.grad != 0).all()  # also where Λ = 0
    randomise(model)
    p, q = layer.lora_B["default"].parametrizations.weight.original, layer.lora_A["default"].weight
    p, q, diagonal = p.flatten(1), q.flatten(1), torch.diag(values.flatten())
    one = torch.eye(2, dtype=p.dtype)
    penalty = (p.T @ p - one).norm() ** 2 + (q @ q.T - one).norm() ** 2
    torch.testing.assert_close(orthogonality(model), penalty)
    found = method.lower_loss(model, None, lambda _: torch.zeros(()))
    torch.testing.assert_close(found["loss"], 0.1 * penalty, check_dtype=False)
    update = (3 / 2 * p @ diagonal @ q).detach()
    method.finish(model)
    after = layer.get_delta_weight("default")
    torch.testing.assert_close(after.T if kind == "conv1d_gpt2" else after.flatten(1), update)


def test_bilora_s_penalty_is_in_float32() -> None:
    model = randomise(peft_model(dora=False)).bfloat16()
    BiLoRA().prepare(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = orthogonality(model)
    torch.testing.assert_close(narrow, orthogonality(model.double()).float(), rtol=1e-5, atol=0)


def test_autolora_selects_ranks_and_keeps_what_remains() -> None:
    """p = (1.5, .5, 1.5, .5) and (.5, .5, 2.5, .5); equal weights all remain."""
    targets = ["layer.0", "layer.1"]
    model = nn.Module()
    model.layer = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)).double()
    model = randomise(wrap(model, use_dora=False, r=4, target_modules=targets, use_rslora=True))
    method = AutoLoRA()
    method.prepare(model)
    for alpha, p in zip(method.upper_variables(model).values(), ([3, 1, 3, 1], [1, 1, 5, 1])):
        alpha.data = torch.tensor([p], dtype=alpha.dtype).log()
    expected = []
    for (_, layer), kept in zip(lora_layers(model), ([0, 2], [2])):
        b, a = layer.lora_B.default.weight, layer.lora_A.default.weight
        expected.append(layer.scaling["default"] * (b[:, kept] @ a[kept]))
    plain = method.finish(model)
    assert method.ranks == {"layer.0": 2, "layer.1": 1}
    for (_, layer), update in zip(lora_layers(plain), expected, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), update)
    method.prepare(plain)
    method.finish(plain)
    assert method.ranks == {"layer.0": 2, "layer.1": 1}


def remaining(method: Any, learned: Any = (), seed: int = 3) -> dict[str, int]:
    """The ranks of `two_layers` after a search that has learned these upper variables.

    The second layer's update is the larger one.
    """
    model = two_layers(r=3)
    torch.manual_seed(seed)
    method.prepare(model)
    with torch.no_grad():
        model.base_model.model.second.lora_A.default.weight *= 100
        for variable, value in zip(method.upper_variables(model).values(), learned):
            variable += torch.tensor(value)
        method.after_search(model)
    ranks = {path: layer.r["default"] for path, layer in lora_layers(method.finish(model))}
    return {path.rpartition(".")[2]: rank for path, rank in ranks.items()}


def test_a_control_has_the_budget_of_what_is_learned() -> None:
    """Two and one of three terms are above the mean; a layer's largest term always remains."""
    learned = [[0.2, 0.2, -0.9]], [[0.9, -0.2, -0.2]]
    assert remaining(AutoLoRA(), learned) == {"first": 2, "second": 1}
    assert remaining(AutoLoRA(choose="sizes"), learned) == {"first": 1, "second": 2}


def test_equal_weights_are_drawn() -> None:
    """As in an ablation without an upper level."""
    found = [remaining(AutoLoRA(share=0.5), seed=seed) for seed in range(12)]
    assert len({str(each) for each in found}) == 2
    assert found[5] == remaining(AutoLoRA(share=0.5), seed=5)
    assert remaining(AutoLoRA(share=0.5, choose="sizes")) == {"first": 1, "second": 2}
    assert remaining(AutoLoRA()) == {"first": 3, "second": 3}


def test_a_control_sees_what_the_search_has_learned(tmp_path: Path) -> None:
    """Though the second phase starts from initial values, where all of B is 0."""
    model = peft_model(dora=False)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_B" in name:
                x.zero_()
    method, seen = AutoLoRA(choose="sizes"), []
    original = method.after_search
    method.after_search = lambda m: (seen.append(float(squares(m).detach())), original(m))
    run = method_trainer(tmp_path, method=method, model=model, retrain="scratch")
    start = float(squares(model).detach())
    run.train()
    assert len(seen) == 1 and seen[0] != start


@pytest.mark.parametrize("stop", [(4, "search"), (2, "retrain")])
def test_a_control_resumes(tmp_path: Path, stop: Any) -> None:
    """Its choice is in the values that both phases share."""

    def make(folder: Path, callbacks: Any = (), **settings: Any) -> Any:
        saving = {"save_strategy": "steps", "save_steps": 3, "retrain": "scratch"}
        return method_trainer(
            folder, callbacks, method=AutoLoRA(choose="sizes"), **saving, **settings
        )

    require_same_end(tmp_path, stop, make=make)


def test_classes_are_counted_and_weighted() -> None:
    """Each class of 3, 1 and no labels; a micro-batch is not divided by its own weights."""
    model, ids = peft_model(dora=False, dropout=0.0), torch.tensor(data()["input_ids"][:4])
    batch = {"input_ids": ids, "labels": torch.tensor([0, 0, 0, 1])}
    rows = [{"input_ids": x, "labels": y} for x, y in zip(ids, batch["labels"], strict=True)]
    losses = cross_entropy(model(input_ids=ids).logits, batch["labels"], reduction="none")
    weighted, adjusted = FrequencyWeights(), LogitAdjustment(tau=2.0)
    for method in (weighted, adjusted):
        method.read_rows(model, rows, default_data_collator)
        assert method.counts.tolist() == [3, 1]
    found = weighted.lower_loss(model, batch, lambda _: torch.zeros(()))
    torch.testing.assert_close(found, (2 / 3 * losses[:3].sum() + 2 * losses[3]) / 4)
    weights = weighted.weights(torch.zeros(1, 3))
    assert weights[batch["labels"]].mean() == pytest.approx(1) and weights.isfinite().all()
    logits = model(input_ids=ids).logits + 2 * torch.tensor([3.0, 1.0, 0.5]).div(4).log()
    found = adjusted.lower_loss(model, batch, lambda _: torch.zeros(()))
    torch.testing.assert_close(found, cross_entropy(logits, batch["labels"]))


def test_offsets_and_factors_are_of_the_lower_loss_alone() -> None:
    """And the upper loss gives both of its classes equal weight."""
    model, ids = peft_model(dora=False, dropout=0.0), torch.tensor(data()["input_ids"][:4])
    batch = {"input_ids": ids, "labels": torch.tensor([0, 0, 0, 1])}
    logits, method = model(input_ids=ids).logits, ClassOffsets(factor=True)
    method.prepare(model)
    for u in method.upper_variables(model).values():
        torch.nn.init.normal_(u)
    scaled = 2 * method.factors.sigmoid() * logits + method.offsets
    found = method.lower_loss(model, batch, None)
    torch.testing.assert_close(found, cross_entropy(scaled, batch["labels"]))
    losses = cross_entropy(logits, batch["labels"], reduction="none")
    for each in (method, TunedAdjustment()):
        expected = (losses[:3].mean() + losses[3]) / 2
        torch.testing.assert_close(each.upper_loss(model, batch, None), expected)


def both_levels(method: Method) -> Any:
    batches, dora = list(zip(two_batches())), isinstance(method, BiDoRA)
    model = peft_model(dora=dora, dropout=0.0).double()
    return method.levels(model, data=batches, optimizers=[SGD, SGD])


def test_bidora_s_lower_loss_has_the_penalty() -> None:
    upper, lower = both_levels(BiDoRA(gamma=0.3))
    loss, metrics = lower.evaluate(lower.peek_batch())
    task, penalty = upper.evaluate(lower.peek_batch())[0], gram_penalty(lower.model)
    torch.testing.assert_close(loss, task + 0.3 * penalty)
    assert metrics == pytest.approx({"task_loss": task.item(), "penalty": penalty.item()})


@pytest.mark.parametrize(
    ("method", "agree"), [(BiDoRA(), True), (BiDoRA(norm_grad="detach"), False)]
)
def test_a_difference_of_two_passes_is_the_derivative_of_one(method: Any, agree: bool) -> None:
    """But not where the norm is outside the graph."""
    levels = both_levels(method)
    (row,) = compare_hypergradients(*levels, ["darts"], "darts:product=exact", repeats=1).rows
    assert row.relative_error < 1e-6 if agree else row.relative_error > 1e-2


def twice() -> Any:
    model = peft_model(dora=False)
    AutoLoRA().prepare(model)
    LayerScales().prepare(model)


def frozen() -> Any:
    model = peft_model(dora=False)
    model.requires_grad_(False)
    return model


def numbers(method: Any) -> Any:
    """A lower loss of labels that are no classes."""
    method.prepare(base_model())
    batch = {"input_ids": torch.ones(2, 4).long(), "labels": torch.ones(2)}
    return method.lower_loss(base_model(), batch, None)


def read(method: Any) -> Any:
    method.read_rows(None, [{"labels": 0.5}], default_data_collator)


REFUSED: dict[str, tuple[Any, str]] = {
    "frozen": (lambda: LayerDecay().prepare(frozen()), "model: no LoRA factor"),
    "no counts": (lambda: LogitAdjustment().class_shares(torch.ones(1, 2)), "call read_rows"),
    "numbers read": (lambda: read(FrequencyWeights()), "labels: must be numbers of classes"),
    "numbers": (lambda: numbers(ClassOffsets()), "labels: must be numbers of classes"),
    "no classes": (lambda: ClassOffsets().prepare(nn.Linear(1, 1)), "num_labels: the model's"),
    "no adapter": (lambda: BiLoRA().prepare(base_model()), "peft_model: "),
    "no levels": (lambda: Direction(base_model()), "peft_model: "),
    "magnitudes": (lambda: BiLoRA().prepare(peft_model()), "DoraLinearVariant.*use_dora"),
    "embedding": (lambda: LayerScales().prepare(single("embedding", use_dora=False)), "Embedding"),
    "rank": (lambda: BiLoRA().prepare(single(use_dora=False, r=5)), "rank 5"),
    "twice": (twice, "has a gain already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ProblemError, match=message):
        make()
