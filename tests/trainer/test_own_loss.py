"""A loss of the user's own has its effect, is given by row, or is refused in one line."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

from hyperopt_peft import (
    BilevelTrainingArguments,
    Method,
    ProblemError,
    attribute,
    bilevel,
    compare_methods,
    why,
)
from hyperopt_peft.comparison import Choice, Runs, compare_heads
from hyperopt_peft.comparison.ablations import OneLevel
from hyperopt_peft.method import WeightedRows, row_losses
from hyperopt_peft.problems import (
    SEAL,
    ClassOffsets,
    GivenWeights,
    LogitAdjustment,
    LoRA,
    RowWeights,
    Sources,
    WeightNet,
)
from hyperopt_peft.utils.models import evaluating, own_loss_of
from tests.support.methods import ARGUMENTS, method_trainer
from tests.support.trainers import CONFIG, QUIET, base_model, data, peft_model

WEIGHTS = torch.tensor([1.0, 5.0, 25.0])


def logits_of(model: Any, inputs: Any) -> Tensor:
    logits: Tensor = model(**{k: x for k, x in inputs.items() if k != "labels"}).logits
    return logits


def of_weights(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
    return cross_entropy(outputs.logits, labels, WEIGHTS)


def focal(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
    losses = cross_entropy(outputs.logits, labels, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def over(term: Callable[[Any, Any, Any], Any]) -> type[Trainer]:
    """A Trainer that adds ``term`` of the trainer, the model and the batch to the loss."""

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            found = super().compute_loss(model, dict(inputs), *args, **options)
            if isinstance(found, tuple):
                return found[0] + term(self, model, inputs), found[1]
            return found + term(self, model, inputs)

    return Own


def factors(model: Any, name: str = "lora_") -> list[Tensor]:
    return [x for n, x in model.named_parameters() if name in n and x.requires_grad]


def r_drop(_: Any, model: Any, inputs: Any) -> Any:
    one, other = (logits_of(model, inputs).log_softmax(-1) for _ in range(2))
    return kl_div(one, other, log_target=True, reduction="batchmean")


def fgm(_: Any, model: Any, inputs: Any) -> Any:
    """The loss at adversarial embeddings."""
    rest = {"attention_mask": inputs["attention_mask"], "labels": inputs["labels"]}
    x = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(model(inputs_embeds=x, **rest).loss, x)
    return model(inputs_embeds=x.detach() + 0.1 * slope, **rest).loss


def later(trainer: Any, model: Any, inputs: Any) -> Any:
    """A curriculum: nothing in the first steps, class weights later."""
    begun = trainer.state.global_step > 1
    return cross_entropy(logits_of(model, inputs), inputs["labels"], WEIGHTS) * float(begun)


def l1(_: Any, model: Any, __: Any) -> Any:
    return 1e-2 * sum(x.abs().sum() for x in factors(model, "lora_B"))


def to_start(trainer: Any, model: Any, __: Any) -> Any:
    """L2-SP; with weights by Fisher information it is EWC."""
    if not hasattr(trainer, "start"):
        trainer.start = [x.detach().clone() for x in factors(model)]
    return sum((a - b).square().sum() for a, b in zip(factors(model), trainer.start))


def ewc(trainer: Any, model: Any, inputs: Any) -> Any:
    """L2-SP with weights by the Fisher information of the first batch."""
    if not hasattr(trainer, "fisher"):
        with torch.enable_grad(), evaluating(model):
            loss = cross_entropy(logits_of(model, inputs), inputs["labels"])
        slopes = torch.autograd.grad(loss, factors(model))
        trainer.fisher = [100 * x.square() for x in slopes]
    _, start = to_start(trainer, model, inputs), trainer.start
    terms = zip(trainer.fisher, factors(model), start, strict=True)
    return sum((f * (a - b).square()).sum() for f, a, b in terms)


def to_base(_: Any, model: Any, inputs: Any) -> Any:
    with torch.no_grad(), model.disable_adapter():
        base = logits_of(model, inputs).log_softmax(-1)
    return kl_div(
        logits_of(model, inputs).log_softmax(-1), base, reduction="batchmean", log_target=True
    )


class Weighted(BertForSequenceClassification):
    """Class weights in the model."""

    def forward(
        self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **more: Any
    ) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            output.loss = cross_entropy(output.logits, labels, WEIGHTS)
        return output


def smoothing(logits: Any = None, labels: Any = None, **_: Any) -> Tensor:
    return cross_entropy(logits, labels, label_smoothing=0.1)


def of_function() -> Any:
    model = base_model()
    model.loss_function = lambda labels, pooled, config: smoothing(pooled, labels)
    model.config.problem_type = "single_label_classification"
    return model


def wrapped() -> Any:
    """A method of one object, which looks like the class's own."""
    model = base_model()
    forward = model.forward

    def larger(
        _: Any, input_ids: Any, attention_mask: Any = None, labels: Any = None, **more: Any
    ) -> Any:
        output = forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        output.loss = None if output.loss is None else 2 * output.loss
        return output

    larger.__module__ = forward.__module__
    model.forward = types.MethodType(larger, model)
    return model


def with_weights(rows: Any) -> Any:
    return rows.add_column("weight", [1.0] * len(rows))


def with_sources(rows: Any) -> Any:
    return rows.add_column("source", ["a", "b"] * (len(rows) // 2))


def unchanged(rows: Any) -> Any:
    return rows


#: Methods, and the function that adds the column that they read.
METHODS: dict[str, Any] = {
    "RowWeights": (RowWeights, unchanged),
    "SEAL": (SEAL, unchanged),
    "WeightNet": (WeightNet, unchanged),
    "ClassOffsets": (ClassOffsets, unchanged),
    "LogitAdjustment": (LogitAdjustment, unchanged),
    "Sources": (Sources, with_sources),
    "GivenWeights": (GivenWeights, with_weights),
}
#: Of each loss: the class of the Trainer, its options, its arguments, and the base model.
LOSSES: dict[str, dict[str, Any]] = {
    "class weights": {"options": {"compute_loss_func": of_weights}},
    "focal loss": {"options": {"compute_loss_func": focal}},
    "label smoothing": {"args": {"label_smoothing_factor": 0.01}},
    "R-Drop": {"kind": over(r_drop)},
    "FGM": {"kind": over(fgm)},
    "L1": {"kind": over(l1)},
    "a curriculum": {"kind": over(later)},
    "L2-SP": {"kind": over(to_start)},
    "EWC": {"kind": over(ewc)},
    "KL to the base": {"kind": over(to_base)},
    "class weights of a model": {"base": lambda: Weighted(copy.deepcopy(CONFIG))},
    "a model's loss function": {"base": of_function},
    "a model's forward": {"base": wrapped},
}


def parts(name: str) -> tuple[type[Trainer], dict[str, Any], dict[str, Any], Callable[[], Any]]:
    found = LOSSES[name]
    base = found.get("base", base_model)
    return found.get("kind", Trainer), found.get("options", {}), found.get("args", {}), base


def adapted(base: Callable[[], Any]) -> Any:
    """With a B of 0, as a new adapter's."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    return get_peft_model(base(), config)


def training(folder: Path, name: str, method: Any, **more: Any) -> Any:
    kind, options, settings, base = parts(name)
    rows = {"train_dataset": data(rows=18), "upper_dataset": data(rows=6, seed=1)}
    options = {**rows, **options, **more}
    made = adapted(base)
    return method_trainer(
        folder, method=method, kind=bilevel(kind), options=options, model=made, **settings
    )


def stock(folder: Path, name: str) -> Any:
    kind, options, settings, base = parts(name)
    args = TrainingArguments(str(folder), max_steps=4, seed=3, **QUIET, **settings)
    rows = {"train_dataset": data(rows=12), "eval_dataset": data(rows=6, seed=1)}
    return kind(model=adapted(base), args=args, **rows, **options)


@pytest.mark.parametrize(
    ("method", "name"),
    [*product(["RowWeights", "LogitAdjustment"], LOSSES), *product(METHODS, ["class weights"])],
)
def test_a_method_that_does_not_train_it_refuses_it(tmp_path: Path, name: str, method: str) -> None:
    kind, change = METHODS[method]
    more = {} if method != "LogitAdjustment" else {"upper_dataset": None}
    named = "compute_loss_func: .*" if name == "class weights" else ""
    with pytest.raises(ProblemError, match=rf"{named}(row_losses|own_loss = True)"):
        training(tmp_path, name, kind(), train_dataset=change(data(rows=18)), **more).train()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ask", [attribute, partial(attribute, model="head"), why])
def test_rows_have_no_scores_without_their_losses(tmp_path: Path, name: str, ask: Any) -> None:
    with pytest.raises(ProblemError, match="row_losses"):
        ask(stock(tmp_path, name), progress=False)


@pytest.mark.parametrize("name", LOSSES)
def test_one_level_trains_it(tmp_path: Path, name: str) -> None:
    """As the Trainer alone does, bit for bit."""
    kind, options, settings, base = parts(name)
    ends = []
    for each in (bilevel(kind), kind):
        args = BilevelTrainingArguments(str(tmp_path), **{**ARGUMENTS, **settings})
        run = each(adapted(base), args, train_dataset=data(rows=18), **options)
        run.train()
        ends.append([x.detach().clone() for x in run.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def compared(methods: Any, name: str, rows: Any = None, **more: Any) -> Any:
    kind, options, settings, base = parts(name)
    args = BilevelTrainingArguments("unused", use_cpu=True, report_to="none", **settings)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    options = {**options, "trainer": bilevel(kind), "runs": Runs(progress=False), **more}
    options |= {"seeds": range(2), "train_dataset": data(rows=24) if rows is None else rows}
    options |= {"upper_dataset": data(rows=9, seed=1), "test_dataset": data(rows=12, seed=2)}
    if options.pop("heads", False):
        return compare_heads(methods, base, args, **options)
    options |= {"passes": 40, "choice": Choice([1e-2], [1e-2])}
    return compare_methods(methods, base, config, args, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_a_comparison_of_unequal_losses_is_refused(name: str) -> None:
    with pytest.raises(ProblemError, match=r"row_losses|own_loss"):
        compared({"LoRA": LoRA(), "adjusted": LogitAdjustment()}, name)


def class_weighted(model: Any, batch: Any) -> Any:
    """ℓ_i = v_y CE_i and c_i = v_y."""
    weights = WEIGHTS.to(batch["labels"].device)[batch["labels"]]
    losses = cross_entropy(logits_of(model, batch), batch["labels"], reduction="none")
    return weights.to(losses) * losses, weights.to(losses)


def test_the_sum_of_the_rows_is_the_loss_of_the_user(tmp_path: Path) -> None:
    """At weights of 1 the level is the Trainer's own loss, and the weights are of its rows."""
    run = training(tmp_path, "class weights", RowWeights(), row_losses=class_weighted)
    run.model.eval()
    (batch, *_) = [run.data_collator([run.train_dataset[k] for k in range(5)])]
    torch.testing.assert_close(run.lower.loss(batch)["loss"], run.task_loss(batch))
    with torch.no_grad():
        run.method.logits.copy_(torch.linspace(-2, 2, 18))
    inputs = {k: x for k, x in batch.items() if k not in run.tags}
    losses, counts = class_weighted(run.model, inputs)
    expected = (run.method.weights(batch) * losses).sum() / counts.sum()
    torch.testing.assert_close(run.lower.loss(batch)["loss"], expected)
    run.train()
    assert float(run.method.logits.detach().abs().max()) > 0


@pytest.mark.parametrize("method", ["RowWeights", "SEAL", "WeightNet", "GivenWeights", "Sources"])
def test_every_method_of_rows_trains_a_loss_by_row(tmp_path: Path, method: str) -> None:
    """With all weights 1, the steps are those of one level with this loss."""
    kind, change = METHODS[method]
    made, more = kind(), {"train_dataset": change(data(rows=18)), "row_losses": class_weighted}
    if method == "GivenWeights":
        more["upper_dataset"] = None
    run = training(tmp_path / "a", "class weights", made, **more)
    run.train()
    assert run.state.global_step == 6
    if method == "GivenWeights":
        plain = training(tmp_path / "b", "class weights", LoRA(), upper_dataset=None)
        plain.train()
        for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Partial:
    """A rule that leaves a part out from its call ``begin`` on."""

    def __init__(self, begin: int) -> None:
        self.begin, self.calls = begin, 0

    def __call__(self, model: Any, batch: Any) -> Any:
        self.calls += 1
        losses, counts = class_weighted(model, batch)
        return losses, counts if self.calls < self.begin else torch.ones_like(counts)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("class weights", row_losses),
        ("class weights", lambda model, batch: class_weighted(model, batch)[0]),
        ("class weights", Partial(7)),  # a call of the level, and one of the comparison, a batch
        ("L1", row_losses),  # of a B that is 0 at first
        ("L2-SP", row_losses),
        ("R-Drop", row_losses),
        ("label smoothing", row_losses),
    ],
)
def test_a_rule_that_is_not_the_loss_is_refused(tmp_path: Path, name: str, rule: Any) -> None:
    with pytest.raises(ProblemError, match="row_losses: their mean"):
        training(tmp_path, name, RowWeights(), row_losses=rule).train()


@pytest.mark.parametrize(
    "rule", [lambda model, batch: model(**batch).loss, lambda *_: (torch.ones(3), torch.ones(2))]
)
def test_a_rule_that_gives_no_rows_is_named(tmp_path: Path, rule: Any) -> None:
    with pytest.raises(ProblemError, match="row_losses: must return the loss of each row"):
        training(tmp_path, "class weights", RowWeights(), row_losses=rule).train()


def test_a_method_that_does_not_read_the_rule_is_named(tmp_path: Path) -> None:
    run = training(tmp_path, "class weights", ClassOffsets(), row_losses=class_weighted)
    with pytest.raises(ProblemError, match=r"row_losses: ClassOffsets.*own_loss"):
        run.train()


@pytest.mark.parametrize("product", ["dots", "difference"])
def test_dot_products_do_not_read_a_user_s_rule(tmp_path: Path, product: str) -> None:
    """Since the loss of a row may read other rows; by the library's own rule they do."""
    options = {"train_dataset": data(rows=18), "upper_dataset": data(rows=6, seed=1)}

    def losses(rule: Any) -> Any:
        given = {**options, "row_losses": rule}
        asked = {"hypergradient": f"darts:product={product}"}
        return method_trainer(tmp_path, method=RowWeights(), options=given, **asked)

    losses(row_losses).train()
    if product == "dots":
        with pytest.raises(ProblemError, match=r"dot products: .*row_losses"):
            losses(lambda *batch: row_losses(*batch)).train()
    else:
        losses(lambda *batch: row_losses(*batch)).train()


def test_a_loss_that_is_said_to_be_the_mean_over_labels_is_one(tmp_path: Path) -> None:
    """So that a method may replace it, as a stock one; and another is refused."""

    class Watching(Trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            return super().compute_loss(*args, **options)

    rows = {"train_dataset": data(rows=18), "row_losses": row_losses}
    method_trainer(tmp_path, method=LogitAdjustment(), kind=bilevel(Watching), options=rows).train()
    with pytest.raises(ProblemError, match="row_losses: their mean"):
        training(tmp_path, "R-Drop", ClassOffsets(), row_losses=row_losses).train()


def test_a_method_says_that_its_loss_is_its_own(tmp_path: Path, caplog: Any) -> None:
    class Mine(ClassOffsets):
        own_loss = True

    training(tmp_path, "class weights", Mine()).train()
    assert "compute_loss_func" in caplog.text


def test_scores_are_of_the_loss_by_row(tmp_path: Path) -> None:
    """The recorded run is the Trainer's own, and a score is a difference of its two trainings."""
    recorded = stock(tmp_path / "a", "class weights")
    found = attribute(recorded, row_losses=class_weighted, progress=False)
    alone = stock(tmp_path / "b", "class weights")
    alone.train()
    for a, b in zip(recorded.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert found.scores.shape == (12,) and found.scores.abs().min() > 0
    plain = stock(tmp_path / "c", "class weights")
    plain.compute_loss_func = None
    assert not torch.allclose(attribute(plain, progress=False).scores, found.scores, rtol=0.1)


def test_a_head_is_at_the_minimum_of_the_loss_by_row(tmp_path: Path) -> None:
    """Its scores are slopes of Φ of that loss, and each row's own part."""
    run = stock(tmp_path, "class weights")
    found = attribute(run, model="head", row_losses=class_weighted, progress=False)
    level, batch = found.trained.final, found.trained.rows()
    slope = torch.autograd.grad(level.evaluate(batch)[0], level.variables)
    assert max(float(x.abs().max()) for x in slope) < 1e-5
    plain = stock(tmp_path, "class weights")
    plain.compute_loss_func = None
    other = attribute(plain, model="head", progress=False)
    assert not torch.allclose(found.scores, other.scores, rtol=0.05)
    assert why(run, row_losses=class_weighted, progress=False)


@pytest.mark.parametrize("heads", [False, True])
def test_a_comparison_judges_methods_by_the_loss_by_row(heads: bool) -> None:
    """A method with all weights 1 has the scores of LoRA."""
    more: dict[str, Any] = {"heads": True, "upper_steps": 2} if heads else {}
    rows = with_weights(data(rows=24))
    methods = {"LoRA": LoRA(), "given": GivenWeights()}
    result = compared(methods, "class weights", rows, row_losses=class_weighted, **more)
    first, second = (result.scores()[name].tolist() for name in methods)
    assert first == pytest.approx(second, rel=1e-3)


def test_an_engine_s_own_loss_is_given_by_row() -> None:
    """Or refused, since a method that weights rows would drop it."""
    model, method = peft_model(dropout=0.0, dora=False), RowWeights()
    sgd = partial(torch.optim.SGD, lr=0.1)
    method.rows([None] * 4, [None])
    mine = lambda batch: 2 * model(**batch).loss  # noqa: E731
    with pytest.raises(ProblemError, match=r"task_loss: .*row_losses"):
        method.levels(model, mine, optimizers=[sgd, sgd])


class OfLevel(WeightedRows):
    """A level of the user's own, over the Trainer's model, with its own rule."""


@pytest.mark.parametrize("rule", [None, class_weighted, row_losses])
def test_a_level_of_the_user_s_own_has_a_rule_of_its_own(tmp_path: Path, rule: Any) -> None:
    weights = lambda batch: torch.ones(len(batch["labels"]))  # noqa: E731
    lower = lambda run: OfLevel(run.model, weights, row_losses=rule)  # noqa: E731
    args = BilevelTrainingArguments(str(tmp_path), **ARGUMENTS)
    options = {"compute_loss_func": of_weights, "train_dataset": data(rows=18)}
    make = lambda: bilevel(Trainer)(adapted(base_model), args, lower=lower, **options)  # noqa: E731
    if rule is class_weighted:
        assert make().train().global_step == 6
    else:
        with pytest.raises(ProblemError, match="row_losses"):
            make().train()


class Above(RowWeights):
    """Weights in the upper level, whose rows have no losses."""

    def lower(self, model: Any, task_loss: Any) -> Any:
        return LoRA.lower(self, model, task_loss)

    def upper(self, model: Any, task_loss: Any) -> Any:
        own = self.upper_variables(model)
        return WeightedRows(model, self.weights, own, tags=self.tags)


def test_an_upper_level_of_rows_needs_their_losses_too(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"compute_loss_func: .*row_losses"):
        training(tmp_path, "class weights", Above())


def test_the_one_level_form_of_a_method_has_its_rule_and_its_word(tmp_path: Path) -> None:
    class Mine(ClassOffsets):
        own_loss = True

    for method, more in ((Mine(), {}), (RowWeights(), {"row_losses": class_weighted})):
        one = OneLevel(method)
        one.tags = method.tags
        training(tmp_path, "class weights", one, **more).train()


def test_a_method_holds_no_trainer(tmp_path: Path) -> None:
    """So that it can be copied and sent, as to other processes of a comparison."""
    method = RowWeights()
    run = training(tmp_path, "class weights", method, row_losses=class_weighted)
    run.train()
    sent = cloudpickle.dumps(method)
    assert len(sent) < 20_000 and cloudpickle.loads(sent).logits.shape == (18,)

    @dataclass(frozen=True)
    class Frozen(Method):
        rank: int = 2

    training(tmp_path, "class weights", Frozen(), upper_dataset=None).train()


def test_batch_normalisation_is_a_stock_model(tmp_path: Path) -> None:
    """The check in training mode leaves buffers and the step's gradients as they were."""
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8, "num_labels": 3}
    rows = [{"pixel_values": torch.randn(3, 16, 16).tolist(), "labels": k % 3} for k in range(18)]

    def ends(method: Any, **more: Any) -> Any:
        torch.manual_seed(0)
        model = ResNetForImageClassification(ResNetConfig(**sizes))
        options = {"train_dataset": Dataset.from_list(rows), **more}
        run = method_trainer(tmp_path, method=method, model=model, options=options)
        run.train()
        return model.state_dict()

    weighted = ends(GivenWeights(), train_dataset=with_weights(Dataset.from_list(rows)))
    plain = ends(LoRA())
    for name, value in plain.items():
        torch.testing.assert_close(weighted[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_what_wraps_a_forward_decides_whose_it_is() -> None:
    """accelerate's hooks are known; a compiled model is its class; a partial is a user's."""
    model = base_model()
    add_hook_to_module(model, ModelHook())
    assert own_loss_of(model) == ""
    model = base_model()
    model.loss_function = partial(cross_entropy, label_smoothing=0.1)
    assert "loss_function" in own_loss_of(model)
    assert "forward" in own_loss_of(torch.compile(Weighted(copy.deepcopy(CONFIG))))
    assert own_loss_of(torch.compile(base_model())) == ""
