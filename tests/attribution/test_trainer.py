"""`attribute` of a Trainer: the run is the Trainer's, and scores are slopes of retraining."""

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Value
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from hyperopt_peft import NonFiniteError, ProblemError, attribute
from hyperopt_peft.attribution import Attribution
from tests.support.attributed import differences
from tests.support.trainers import CONFIG, data, peft_model, values

KINDS = ("classes", "regression", "tokens", "causal")


def stock(folder: Path, kind: str = "classes", **options: Any) -> Trainer:
    """A stock Trainer in float64, with dropout, accumulation, clipping, warm-up and decay."""
    model = peft_model(kind, dora=False).double()
    settings: dict[str, Any] = {
        "max_steps": 10,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "max_grad_norm": 0.5,
        "per_device_eval_batch_size": 5,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    args = TrainingArguments(str(folder), **{**settings, **options.pop("args", {})})
    given = {"train_dataset": data(kind, 14), "eval_dataset": data(kind, 7, seed=1), **options}
    return Trainer(model, args, **given)


def attributed(trainer: Any, **options: Any) -> Attribution:
    return attribute(trainer, progress=False, **options)


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
    truth = differences(result, epsilon)
    assert float((result.scores - truth).norm() / truth.norm()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_is_the_trainers_own(tmp_path: Path, kind: str) -> None:
    """With weights of one: variables and evaluation loss of the stock Trainer."""
    args = {"gradient_accumulation_steps": 1}  # which rounds in another order
    plain = stock(tmp_path, kind, args=args)
    plain.train()
    watched = stock(tmp_path, kind, args=args)
    result = attributed(watched)
    rounding = 1e-4 if kind == "causal" else 1e-12  # Llama computes in float32
    for name, value in values(watched.model).items():
        own = values(plain.model)[name]
        assert float((value - own).norm() / own.norm()) < rounding, name
    expected = plain.evaluate()["eval_loss"]
    if kind not in ("tokens", "causal"):  # of tokens the Trainer averages over batches
        assert result.values["all"] == pytest.approx(expected, rel=1e-6)


def test_slices_have_a_loss_each(tmp_path: Path) -> None:
    rows = data(rows=7, seed=1).add_column("source", ["x", "y", "x", "x", "y", "x", "x"])
    result = attributed(stock(tmp_path, eval_dataset=rows), slices="source")
    alone = attributed(stock(tmp_path, eval_dataset=rows.select([1, 4])))
    assert set(result.by_slice) == {"x", "y"}
    assert torch.allclose(result.by_slice["y"], alone.scores, rtol=1e-9)
    whole = (5 * result.by_slice["x"] + 2 * result.by_slice["y"]) / 7
    assert torch.allclose(result.scores, whole)


@pytest.mark.parametrize(
    "estimator", ["minres:damping=0.1", "nystrom:damping=1.0", "cg:steps=5,damping=1.0", "gradient"]
)
def test_methods_of_the_end_swap_by_name(tmp_path: Path, estimator: str) -> None:
    result = attributed(stock(tmp_path), estimator=estimator)
    assert result.scores.isfinite().all() and result.scores.abs().sum() > 0


def test_a_finished_run_begins_again_with_model_init(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    fresh = attributed(stock(tmp_path)).scores
    trainer.train()
    with pytest.raises(ProblemError, match="model_init"):
        attributed(trainer)
    trainer.model_init = lambda: peft_model(dora=False).double()
    again = attributed(trainer).scores
    assert again.isfinite().all() and len(again) == len(fresh)


def test_what_a_user_does_with_it(tmp_path: Path) -> None:
    """Table, file, picture, suspects and a removal judged on other rows."""
    rows = data(rows=14).add_column("text", [f"row, {k}" for k in range(14)])
    rows = rows.cast_column("text", Value("large_string"))  # as pandas has it
    result = attributed(stock(tmp_path, train_dataset=rows))
    assert "row, " in result.table(2)
    result.to_csv(tmp_path / "attribution.csv")
    with (tmp_path / "attribution.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["text"] for row in table] == rows["text"][:]
    assert sorted(int(row["rank"]) for row in table) == list(range(1, 15))
    result.plot(tmp_path / "attribution.png")
    assert (tmp_path / "attribution.png").stat().st_size > 10_000
    found = result.suspects(folds=3)
    assert found.probabilities.sum(1).allclose(torch.ones(14, dtype=torch.float64))
    assert found.confidence.shape == (14,)
    removal = result.removal(0.2, data(rows=9, seed=2), draws=1)
    assert {*removal.plain} == {"loss", "accuracy"} and "random" in str(removal)


def test_gpt2_has_no_accuracy_of_unshifted_tokens(tmp_path: Path) -> None:
    """Its name is in no mapping of shifted losses; its loss shifts."""
    config = GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2
    )
    adapter = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel(config), adapter).double()
    sets = {"train_dataset": data("causal", 14), "eval_dataset": data("causal", 7, seed=1)}
    test = data("causal", 5, seed=2)
    result = attributed(Trainer(model, stock(tmp_path).args, **sets), estimator="gradient")
    plain = result.removal(0.2, test, draws=1).plain
    batch = {name: torch.tensor(test[name][:]) for name in ("input_ids", "labels")}
    assert {*plain} == {"loss"}
    assert plain["loss"] == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)


def test_out_of_fold_probabilities_are_of_runs_without_the_fold(tmp_path: Path) -> None:
    """A row whose weight is zero changes nothing: other labels, the same probabilities."""

    def changed(rows: Dataset, row: int) -> Dataset:
        labels = rows["labels"][:]
        labels[row] = (labels[row] + 1) % 3
        return rows.remove_columns("labels").add_column("labels", labels)

    rows, row = data(rows=14), 5
    one = attributed(stock(tmp_path, train_dataset=rows)).suspects(folds=14)
    other = attributed(stock(tmp_path, train_dataset=changed(rows, row))).suspects(folds=14)
    assert torch.allclose(one.probabilities[row], other.probabilities[row], rtol=1e-9)
    assert not torch.allclose(one.probabilities[0], other.probabilities[0], rtol=1e-9)


def test_rows_in_a_list_may_have_columns_that_the_model_does_not_take(tmp_path: Path) -> None:
    """As with the stock Trainer, whose collator removes them."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    train, evaluation = (
        [{**row, "text": "a tweet"} for row in data(rows=count, seed=seed)]
        for count, seed in ((14, 0), (7, 1))
    )
    given = {"train_dataset": train, "eval_dataset": evaluation, "data_collator": collate}
    assert torch.equal(
        attributed(stock(tmp_path, **given)).scores,
        attributed(stock(tmp_path, data_collator=collate)).scores,
    )


class OwnOptimizer(Trainer):
    def create_optimizer(self, *args: Any) -> Any:
        return super().create_optimizer(*args)


def dora(folder: Path) -> Trainer:
    """With PEFT's own layers."""
    given = {"train_dataset": data(rows=14), "eval_dataset": data(rows=7, seed=1)}
    return Trainer(peft_model(), stock(folder).args, **given)


def bad(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    rows = data(rows=14)
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "no evaluation": (stock(folder, eval_dataset=None), {}),
        "evaluation is training": (stock(folder, train_dataset=rows, eval_dataset=rows), {}),
        "no training rows": (stock(folder, train_dataset=rows.select([])), {}),
        "no such slice": (stock(folder), {"slices": "source"}),
        "own loss": (stock(folder, compute_loss_func=lambda o, y, n: o.logits.sum()), {}),
        "smoothing": (stock(folder, args={"label_smoothing_factor": 0.1}), {}),
        "not a trainer": (object(), {}),
        "norm": (dora(folder), {}),
        "norm, at the end": (dora(folder), {"estimator": "minres"}),
        "steps": (stock(folder), {"training_steps": 3}),
        "optimizer": (stock(folder, args={"optim": "adafactor"}), {}),
        "own optimizer": (
            OwnOptimizer(
                peft_model(dora=False),
                stock(folder).args,
                train_dataset=rows,
                eval_dataset=data(rows=7, seed=1),
            ),
            {},
        ),
        "labels": (
            stock(
                folder, train_dataset=rows.remove_columns("labels").add_column("labels", [3] * 14)
            ),
            {},
        ),
        "sequences": (
            stock(
                folder,
                "seq2seq",
                train_dataset=data("seq2seq", 14),
                eval_dataset=data("seq2seq", 7, seed=1),
            ),
            {},
        ),
        "noise": (stock(folder, args={"neftune_noise_alpha": 5.0}), {}),
    }
    return cases[name]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("no evaluation", "evaluation"),
        ("evaluation is training", "evaluation"),
        ("no training rows", "train_dataset"),
        ("no such slice", "slices"),
        ("own loss", "loss"),
        ("smoothing", "loss"),
        ("not a trainer", "training"),
        ("steps", "steps"),
        ("norm", "norm"),
        ("norm, at the end", "norm"),
        ("optimizer", "Adafactor"),
        ("own optimizer", "OwnOptimizer has a create_optimizer"),
        ("labels", "num_labels"),
        ("sequences", "DataCollatorForSeq2Seq"),
        ("noise", "neftune_noise_alpha"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, named: str) -> None:
    trainer, options = bad(name, tmp_path)
    with pytest.raises(ProblemError, match=named):
        attributed(trainer, **options)


def test_scores_of_a_row_twice_are_alike(tmp_path: Path) -> None:
    """The scores of copies of a row, in one batch, are equal without dropout."""
    rows = data(rows=4)
    twice = Dataset.from_dict({k: [*rows[k], *rows[k]] for k in rows.column_names})
    trainer = stock(
        tmp_path,
        train_dataset=twice,
        args={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    )
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    scores: Tensor = attributed(trainer).scores
    assert torch.allclose(scores[:4], scores[4:], rtol=1e-9)


def test_a_second_attribution_does_not_go_on_from_the_first(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    attributed(trainer)
    with pytest.raises(ProblemError, match="model_init"):
        attributed(trainer, estimator="gradient")


def test_model_init_gives_the_trainers_own_run_each_time(tmp_path: Path) -> None:
    """The new head's values and the dropout masks are those of ``train``."""
    given = stock(tmp_path)

    def new() -> Any:
        return get_peft_model(
            BertForSequenceClassification(copy.deepcopy(CONFIG)),
            LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], lora_dropout=0.1),
        ).double()

    args = {**given.args.to_dict(), "gradient_accumulation_steps": 1, "report_to": "none"}
    trainer = Trainer(
        model_init=new,
        args=TrainingArguments(**args),
        train_dataset=given.train_dataset,
        eval_dataset=given.eval_dataset,
    )
    trainer.train()
    expected = values(trainer.model)
    one, other = (attributed(trainer), attributed(trainer))
    assert torch.equal(one.scores, other.scores)
    for name, value in values(trainer.model).items():
        assert torch.allclose(value, expected[name], rtol=1e-9, atol=1e-12), name


def test_a_given_optimizer_is_the_runs(tmp_path: Path) -> None:
    def given() -> Trainer:
        trainer = stock(tmp_path, args={"gradient_accumulation_steps": 1})
        variables = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.optimizer = torch.optim.SGD(variables, lr=0.1, momentum=0.9)
        return trainer

    plain, watched = given(), given()
    plain.train()
    result = attributed(watched)
    for name, value in values(watched.model).items():
        assert torch.allclose(value, values(plain.model)[name], rtol=1e-12), name
    truth = differences(result)
    assert float((result.scores - truth).norm() / truth.norm()) < 1e-6


def test_the_run_evaluates_and_prints_nothing(tmp_path: Path, capsys: Any) -> None:
    attributed(stock(tmp_path, args={"eval_on_start": True, "logging_first_step": True}))
    assert capsys.readouterr().out == ""


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


def test_losses_are_those_of_the_rows_in_batches_of_any_size(tmp_path: Path) -> None:
    """At a rate of 0, without dropout; the last batch of each epoch is smaller."""
    args = {"learning_rate": 1e-300, "weight_decay": 0.0, "gradient_accumulation_steps": 1}
    rows = data(rows=14)
    trainer = stock(tmp_path, args=args | {"per_device_train_batch_size": 13}, train_dataset=rows)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    result = attributed(trainer)
    trainer.model.eval()
    logits = trainer.model(input_ids=torch.tensor(rows["input_ids"][:])).logits
    labels = torch.tensor(rows["labels"][:])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(result.losses, expected.detach(), rtol=1e-9)


def test_a_row_without_a_label_was_seen_and_has_no_influence(tmp_path: Path) -> None:
    labels = [-100, *[k % 3 for k in range(1, 14)]]
    rows = data(rows=14).remove_columns("labels").add_column("labels", labels)
    result = attributed(stock(tmp_path, train_dataset=rows))
    assert result.scores[0] == 0 and result.settings["unseen"] == 0
    found = result.suspects(folds=2)
    assert found.confidence[0].isnan() and 0 not in found.flagged
    assert found.confidence[1:].isfinite().all()


def test_test_rows_that_the_scores_have_seen_are_refused(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    result = attributed(trainer)
    with pytest.raises(ProblemError, match="7 of 7 rows are evaluation rows"):
        result.removal(0.2, trainer.eval_dataset, draws=1)
    with pytest.raises(ProblemError, match="1 of 1 rows are training rows"):
        result.removal(0.2, trainer.train_dataset.select([3]), draws=1)


def test_as_many_folds_as_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    from hyperopt_peft.attribution.run import Run

    result, trained = attributed(stock(tmp_path, train_dataset=data(rows=6))), []
    plain = Run.repeated
    monkeypatch.setattr(Run, "repeated", lambda self, v: (trained.append(v), plain(self, v))[1])
    result.suspects(folds=5)
    assert len(trained) == 5
