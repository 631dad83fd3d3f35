"""`attribute` of a Trainer: the run is the Trainer's, and scores are slopes of retraining."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Value
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import hyperopt_peft
from hyperopt_peft import (
    BiDoRA,
    BilevelTrainer,
    BilevelTrainingArguments,
    Method,
    NonFiniteError,
    ProblemError,
)
from hyperopt_peft.attribution.rows import ModelOnRows
from hyperopt_peft.attribution.suspects import suspects
from hyperopt_peft.core.labels import WEIGHT
from hyperopt_peft.problems import DoRA
from tests.support.attributed import attributed, error_of_slopes, require_equal
from tests.support.methods import ARGUMENTS, method_trainer
from tests.support.trainers import (
    CONFIG,
    COUNTS_RIGHT,
    QUIET,
    data,
    longest_first,
    padded,
    peft_model,
    ragged,
)
from tests.support.trainers import trainer as bilevel_trainer

PACKAGE = str(Path(hyperopt_peft.__file__).parent)
KINDS = ("classes", "regression", "tokens", "causal")


def stock(folder: Path, kind: str = "classes", **options: Any) -> Trainer:
    """A stock Trainer in float64, with dropout, accumulation, clipping, warm-up and decay."""
    model = options.pop("model", None) or peft_model(kind, dora=False).double()
    settings: dict[str, Any] = {
        "max_steps": 10,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "max_grad_norm": 0.5,
        "per_device_eval_batch_size": 5,
        "seed": 3,
        **QUIET,
    }
    args = TrainingArguments(str(folder), **{**settings, **options.pop("args", {})})
    sets = {"train_dataset": data(kind, 14), "eval_dataset": data(kind, 7, seed=1)}
    return options.pop("trainer", Trainer)(model, args, **sets | options)


def in_float64(rows: list[Any]) -> dict[str, Any]:
    """A collated batch; the gradient of torch 2.11's `mse_loss` refuses float32 with float64."""
    batch = default_data_collator(rows)
    return {**batch, "labels": batch["labels"].double()}


def labelled(labels: list[int]) -> Dataset:
    rows = data(rows=len(labels)).remove_columns("labels")
    return rows.add_column("labels", labels)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_slopes_of_retraining(tmp_path: Path, kind: str) -> None:
    """Rows with a varying number of labels included."""
    rows = data(kind, 14)
    if kind in ("tokens", "causal"):
        labels = [[-100] * (row % 3) + rows["labels"][row][row % 3 :] for row in range(14)]
        rows = rows.remove_columns("labels").add_column("labels", labels)
    result = attributed(stock(tmp_path, kind, train_dataset=rows))
    # Transformers' Llama computes norms and losses in float32, whatever the dtype of its weights.
    epsilon, tolerance = (1e-2, 1e-2) if kind == "causal" else (1e-5, 1e-6)
    assert error_of_slopes(result, epsilon) < tolerance


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_is_the_trainers_own(tmp_path: Path, kind: str, accumulation: int) -> None:
    """With weights of one: variables and evaluation loss of the stock Trainer.

    An epoch ends with micro-batches of three and of two rows.
    """
    if kind == "causal" and not COUNTS_RIGHT:
        pytest.skip("the stock Trainer's loss is no mean over labels")
    args = {"gradient_accumulation_steps": accumulation, "optim": "sgd", "learning_rate": 0.5}
    options: dict[str, Any] = {"args": args, "train_dataset": data(kind, 11)}
    if kind == "regression":
        options["data_collator"] = in_float64
    plain = stock(tmp_path, kind, **options)
    plain.train()
    watched = stock(tmp_path, kind, **options)
    result = attributed(watched)
    # Llama computes in float32.
    require_equal(watched.model, plain.model, 1e-4 if kind == "causal" else 1e-12)
    if kind not in ("tokens", "causal"):  # of tokens the Trainer averages over batches
        assert result.value == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


def over_batches(folder: Path) -> Trainer:
    """Its model takes no number of labels, and micro-batches have different numbers."""
    model = peft_model("tokens", dora=False).double()
    model.get_base_model().accepts_loss_kwargs = False
    return stock(folder, "tokens", model=model, train_dataset=ragged("tokens", 11))


def over_labels(folder: Path) -> Trainer:
    """A bilevel trainer of one level, whose mean is over the labels of a step."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 3, "rows": 11, "method": "lora"}
    trainer = bilevel_trainer(folder, gradient_accumulation_steps=2, **settings)
    trainer.eval_dataset = data(rows=7, seed=1)
    return trainer


@pytest.mark.parametrize(("make", "rounding"), [(over_batches, 1e-9), (over_labels, 1e-5)])
def test_a_mean_over_micro_batches_is_the_trainers_own(
    tmp_path: Path, make: Any, rounding: float
) -> None:
    plain, watched = make(tmp_path), make(tmp_path)
    plain.train()
    attributed(watched)
    require_equal(watched.model, plain.model, rounding)


class Numbered(Method):
    """Its loss reads the numbers of rows."""

    tags = ("index",)

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        return task_loss(batch) * (1 + batch["index"].double().mean() / 12)


def test_a_method_of_one_level_has_the_scores_of_its_loss(tmp_path: Path) -> None:
    def trainer() -> BilevelTrainer:
        model = peft_model(dora=False).double()
        settings = {**ARGUMENTS, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
        args = BilevelTrainingArguments(str(tmp_path), **settings)
        sets = {"train_dataset": data(rows=12), "eval_dataset": data(rows=6, seed=1)}
        return BilevelTrainer(model, args, method=Numbered(), **sets)

    plain, watched = trainer(), trainer()
    plain.train()
    result = attributed(watched)
    require_equal(watched.model, plain.model, 1e-9)
    assert error_of_slopes(result) < 1e-6


class OwnLoss(Method):
    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        return cross_entropy(self.logits_of(model, batch), batch["labels"])


class Changed(Method):
    def finish(self, model: Any) -> Any:
        return model


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (BiDoRA(), "has two levels"),
        (Changed(), "Changed.finish"),
        (OwnLoss(), "does not read the row weights"),
        (None, "a level of your own"),
    ],
)
def test_other_bilevel_trainers_are_refused(
    tmp_path: Path, method: Method | None, named: str
) -> None:
    options = {"eval_dataset": data(rows=6, seed=1)}
    model = peft_model(dora=isinstance(method, BiDoRA))
    trainer = method_trainer(tmp_path, method=method or Method(), model=model, options=options)
    trainer.method = method
    with pytest.raises(ProblemError, match=named):
        attributed(trainer)


def test_a_head_scores_the_rows_of_both_levels(tmp_path: Path) -> None:
    """In the user's order, whatever rows the trainer holds out for the upper level."""
    sets = {"train_dataset": data(rows=14), "eval_dataset": data(rows=7, seed=1)}
    trainers = [
        method_trainer(tmp_path, method=method, model=peft_model(), options=sets)
        for method in (BiDoRA(), DoRA(fast_dora=False))
    ]
    one, other = (attributed(trainer, model="head").scores for trainer in trainers)
    assert len(trainers[0].train_dataset) < 14
    torch.testing.assert_close(one, other)


def test_what_a_user_does_with_it(tmp_path: Path) -> None:
    """Table, picture, suspects and a check."""
    rows = data(rows=14).add_column("text", [f"row, {k}" for k in range(14)])
    rows = rows.cast_column("text", Value("large_string"))  # as pandas has it
    result = attributed(stock(tmp_path, train_dataset=rows))
    assert "row, " in result.table(2)
    result.plot(tmp_path / "attribution.png")
    assert (tmp_path / "attribution.png").stat().st_size > 10_000
    doubts = result.suspects(folds=3)
    assert doubts.probabilities.sum(1).allclose(torch.ones(14, dtype=torch.float64))
    assert doubts.confidence.shape == (14,)
    assert "unchecked" in result.table(2)
    result.check(5, share=0.2, perturbation=None)
    assert "unchecked" not in result.table(2)


@pytest.mark.parametrize("model", ["adapter", "head"])
@pytest.mark.parametrize("form", ["columns", "transform"])
def test_shown_columns_are_those_stored(tmp_path: Path, form: str, model: Any) -> None:
    """Whatever the format gives to the collator."""

    def formatted(rows: Dataset) -> Dataset:
        texts = [f"row {k}" for k in range(len(rows))]
        rows = rows.add_column("text", texts)
        names = ["input_ids", "attention_mask", "labels"]
        if form == "columns":
            return rows.with_format("torch", columns=names)
        return rows.with_transform(lambda batch: {name: batch[name] for name in names})

    args = {"remove_unused_columns": form == "columns", "max_steps": 2}
    sets = {
        "train_dataset": formatted(data(rows=14)),
        "eval_dataset": formatted(data(rows=7, seed=1)),
    }
    result = attributed(stock(tmp_path, args=args, **sets), model=model)
    assert result.columns["text"][3] == "row 3" and result.columns["labels"][:3] == ["a", "b", "c"]


def test_out_of_fold_probabilities_are_of_runs_without_the_fold(tmp_path: Path) -> None:
    """A row whose weight is zero changes nothing: other labels, the same probabilities."""

    labels = [row % 3 for row in range(14)]
    changed = [*labels[:5], 0, *labels[6:]]
    one, other = (
        attributed(stock(tmp_path, train_dataset=labelled(column))).suspects(folds=2)
        for column in (labels, changed)
    )
    same = (one.probabilities - other.probabilities).abs().amax(1) < 1e-9
    assert same[5] and same.sum() == 7


@pytest.mark.parametrize(("wrong", "kappa"), [(41, 0.18), (10, 0.8)])
def test_a_model_near_chance_flags_no_label(wrong: int, kappa: float) -> None:
    """A hundred rows of two classes, of which the out-of-fold model disagrees with ``wrong``."""
    labels = torch.arange(100) % 2
    confident = torch.where(torch.arange(100) < wrong, 0.1, 0.9).double()
    of_ones = torch.where(labels == 1, confident, 1 - confident)
    setup: Any = SimpleNamespace(
        run=SimpleNamespace(without=lambda rows: nullcontext()),
        labels=labels,
        probabilities=lambda rows: torch.stack([1 - of_ones, of_ones], 1)[rows],
        progress=False,
    )
    found = suspects(setup, folds=5, seed=0)
    assert found.accuracy == pytest.approx(1 - wrong / 100)
    assert found.kappa == pytest.approx(kappa, abs=0.005)
    assert {*found.flagged} <= {*range(wrong)} and bool(found.flagged) == (kappa > 0.2)
    assert ("no label is flagged" in str(found)) == (not found.flagged)
    assert max(map(len, str(found).splitlines())) < 150


def test_rows_in_a_list_may_have_columns_that_the_model_does_not_take(tmp_path: Path) -> None:
    """As with the stock Trainer, whose collator removes them."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    train, evaluation = (
        [{**row, "text": "a tweet"} for row in data(rows=count, seed=seed)]
        for count, seed in ((14, 0), (7, 1))
    )
    lists = {"train_dataset": train, "eval_dataset": evaluation}
    one, other = (
        attributed(stock(tmp_path, data_collator=collate, **sets)) for sets in (lists, {})
    )
    assert torch.equal(one.scores, other.scores)


LONG = data(rows=5, seed=4).map(
    lambda row, index: {"input_ids": row["input_ids"] * (86 if index == 3 else 1)},
    with_indices=True,
)


class OwnOptimizer(Trainer):
    def create_optimizer(self, *args: Any) -> Any:
        return super().create_optimizer(*args)


def with_ids(rows: Dataset, begin: int) -> Dataset:
    return rows.add_column("idx", [*range(begin, begin + len(rows))])


SAME = {"train_dataset": with_ids(data(rows=14), 0)}
SAME["eval_dataset"] = with_ids(data(rows=14), 100).select(range(7))
SORTED = {"train_dataset": padded(data(rows=14)), "data_collator": longest_first}
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"eval_dataset": None}, {}, "eval_dataset: there is none"),
    ({"eval_dataset": data(rows=14)}, {}, "evaluation: every row of it is a training row"),
    (SAME, {}, "evaluation: every row of it is a training row"),
    (SAME, {"model": "head"}, "evaluation: every row of it is a training row"),
    (SORTED, {}, "data_collator: returns its rows in another order"),
    (SORTED, {"model": "head"}, "data_collator: returns its rows in another order"),
    ({"train_dataset": data(rows=14).select([])}, {}, "train_dataset"),
    ({"train_dataset": labelled([3] * 14)}, {}, "num_labels"),
    ({"eval_dataset": labelled([3] * 7)}, {}, "num_labels"),
    ({"eval_dataset": labelled([3] * 7)}, {"model": "head"}, "num_labels"),
    ({"train_dataset": LONG}, {}, "row 3 has 516 tokens, and the model positions for 512"),
    ({"eval_dataset": LONG}, {"model": "head"}, "row 3 has 516 tokens"),
    ({"kind": "seq2seq"}, {}, "DataCollatorForSeq2Seq"),
    (
        {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()},
        {},
        "compute_loss_func: .* row_losses",
    ),
    ({"args": {"neftune_noise_alpha": 5.0}}, {}, "neftune_noise_alpha"),
    ({"args": {"optim": "adafactor"}}, {}, "Adafactor"),
    ({"trainer": OwnOptimizer}, {}, "OwnOptimizer has a create_optimizer"),
    ({"dora": True}, {}, "norm"),
    ({"dora": True}, {"estimator": "minres"}, "norm"),
    ({}, {"model": "tail"}, "model"),
    ({}, {"model": "head", "estimator": "unrolled"}, "a head has no steps"),
    ({"kind": "causal"}, {"model": "head"}, "the labels of LlamaForCausalLM are text"),
    ({"kind": "seq2seq"}, {"model": "head"}, "the labels of T5"),
    ({}, {"training_steps": 3}, "training_steps"),
]


@pytest.mark.parametrize(("options", "asked", "fragment"), BAD)
def test_bad_input_is_named(
    tmp_path: Path, options: dict[str, Any], asked: dict[str, Any], fragment: str
) -> None:
    options = dict(options)
    if options.pop("dora", False):
        options["model"] = peft_model()
    with pytest.raises(ProblemError, match=fragment):
        attributed(stock(tmp_path, **options), **asked)


def test_model_init_gives_the_trainers_own_run_each_time(tmp_path: Path) -> None:
    """The new head's values and the dropout masks are those of ``train``."""
    given = stock(tmp_path, args={"gradient_accumulation_steps": 1})
    adapter = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], lora_dropout=0.1)
    sets = {"train_dataset": given.train_dataset, "eval_dataset": given.eval_dataset}

    def trainer() -> Trainer:
        def new() -> Any:
            model = BertForSequenceClassification(copy.deepcopy(CONFIG))  # which its loss changes
            return get_peft_model(model, adapter).double()

        return Trainer(model_init=new, args=given.args, **sets)

    plain, watched = trainer(), trainer()
    plain.train()
    one, other = (attributed(watched), attributed(watched))
    assert torch.equal(one.scores, other.scores)
    require_equal(watched.model, plain.model, 1e-9)


def test_a_given_optimizer_is_the_runs(tmp_path: Path) -> None:
    def with_optimizer() -> Trainer:
        trainer = stock(tmp_path, args={"gradient_accumulation_steps": 1})
        variables = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.optimizer = torch.optim.SGD(variables, lr=0.1, momentum=0.9)
        return trainer

    plain, watched = with_optimizer(), with_optimizer()
    plain.train()
    result = attributed(watched)
    require_equal(watched.model, plain.model, 1e-12)
    assert error_of_slopes(result) < 1e-6


def test_the_run_evaluates_and_prints_nothing(tmp_path: Path, capsys: Any) -> None:
    attributed(stock(tmp_path, args={"eval_on_start": True, "logging_first_step": True}))
    assert capsys.readouterr().out == ""


class Own(TrainerCallback):
    pass


def test_what_the_run_does_not_call_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line; the Trainer's own callbacks are not named."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    best |= {"metric_for_best_model": "loss"}
    callbacks = [EarlyStoppingCallback(3), Own()]
    attributed(stock(tmp_path / "plain"))
    assert "scores are of a run without" not in caplog.text
    attributed(stock(tmp_path / "own", callbacks=callbacks, args=best))
    words = "without EarlyStoppingCallback, Own, load_best_model_at_end; "
    assert sum(words in record.message for record in caplog.records) == 1


def test_a_run_that_diverges_leaves_the_users_folder_alone(tmp_path: Path) -> None:
    args = {"learning_rate": 1e300, "warmup_steps": 0, "optim": "sgd", "max_grad_norm": 0.0}
    trainer = stock(tmp_path, args=args)
    with pytest.raises(NonFiniteError, match="step 2: training: the loss is") as caught:
        attributed(trainer)
    assert "checkpoint" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("estimator", ["minres:damping=0.1", "gradient"])
def test_the_end_of_a_run_needs_neither_derivatives_nor_memory(
    tmp_path: Path, estimator: str
) -> None:
    """Of an optimizer without a known derivative scores are known, and repetitions are refused."""
    trainer = stock(tmp_path, args={"optim": "adafactor"})
    result = attributed(trainer, estimator=estimator, memory_limit=1e-9)
    assert result.scores.isfinite().all() and result.scores.abs().sum() > 0
    with pytest.raises(ProblemError, match="Adafactor"):
        result.check(5, share=0.2)
    repeated = attributed(stock(tmp_path), estimator=estimator, memory_limit=1e-9)
    assert repeated.check(5, share=0.2).actual.isfinite().all()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_are_those_of_the_rows_in_batches_of_any_size(
    tmp_path: Path, accumulation: int
) -> None:
    """At a rate of 0, without dropout; the last micro-batch of each epoch is smaller."""
    args = {"learning_rate": 1e-300, "weight_decay": 0.0}
    args |= {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 13}
    rows, model = data(rows=14), peft_model(dropout=0.0, dora=False).double()
    result = attributed(stock(tmp_path, args=args, train_dataset=rows, model=model))
    logits = model.eval()(input_ids=torch.tensor(rows["input_ids"][:])).logits
    expected = cross_entropy(logits, torch.tensor(rows["labels"][:]), reduction="none")
    assert torch.allclose(result.losses, expected.detach(), rtol=1e-9)


def test_a_row_without_a_label_was_seen_and_has_no_influence(tmp_path: Path) -> None:
    rows = labelled([-100, *[k % 3 for k in range(1, 14)]])
    result = attributed(stock(tmp_path, train_dataset=rows))
    assert result.scores[0] == 0 and result.settings["unseen"] == 0
    doubts = result.suspects(folds=2)
    assert doubts.confidence[0].isnan() and 0 not in doubts.flagged
    assert doubts.confidence[1:].isfinite().all()


def test_a_trainer_that_has_trained_and_other_objects_are_refused(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    attributed(trainer, estimator="gradient")
    for training, named in ((trainer, "model_init"), (object(), "training")):
        with pytest.raises(ProblemError, match=named):
            attributed(training, estimator="gradient")


@pytest.mark.parametrize(("model", "most"), [("adapter", 11), ("head", 6)])
def test_few_functions_take_the_training_itself(tmp_path: Path, model: Any, most: int) -> None:
    """Beyond the door they take its `TrainerData`."""
    trainer, found = stock(tmp_path), set[tuple[str, str]]()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        of_package = code.co_filename.startswith(PACKAGE) and event == "call"
        if of_package and any(frame.f_locals.get(name) is trainer for name in given):
            found.add((code.co_filename, code.co_qualname))

    sys.setprofile(watch)
    try:
        attributed(trainer, model=model)
    finally:
        sys.setprofile(None)
    assert 0 < len(found) <= most, found
    assert len({file for file, _ in found}) <= 7


def test_batches_count_by_their_labels() -> None:
    """As one step over all rows, whose loss is the mean over all labels."""
    rows, model = ragged("tokens", 7), peft_model("tokens", dropout=0.0).double()
    batches = [default_data_collator([rows[k] for k in part]) for part in ([0, 1, 4], [2, 3], [5])]
    on_rows = ModelOnRows(model)
    micro = on_rows.micro_batches(batches)
    sums, counts = zip(*(on_rows.losses(batch) for batch in batches), strict=True)
    weighted = [
        each.batch[WEIGHT] * part.sum() / count.sum()
        for each, part, count in zip(micro, sums, counts, strict=True)
    ]
    mean = torch.cat(sums).sum() / torch.cat(counts).sum()
    torch.testing.assert_close(torch.stack(weighted).mean(), mean)
