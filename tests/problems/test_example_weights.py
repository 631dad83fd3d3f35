"""The losses of single examples are those that the model itself has for each of them alone."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from hyperopt_peft import ProblemError
from hyperopt_peft.problems.data_sources import Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import HeldOut, column, example_losses
from hyperopt_peft.problems.reweighting import SampleWeights, Weighted
from tests.support.trainers import base_model, data, peft_model


def batch_of(kind: Any, rows: int = 5) -> dict[str, Any]:
    table = data(kind, rows)
    return {name: torch.tensor(table[name][:]) for name in table.column_names}


def alone(model: nn.Module, batch: Any) -> Any:
    """The model's own loss on each example as a batch of one."""
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
    return torch.stack([model(**row).loss for row in rows])


class HomeMade(LlamaForCausalLM):
    """A causal model of a class that Transformers does not list, as remote code has."""


def home_made() -> Any:
    model = HomeMade(base_model("causal").config)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def gpt2() -> Any:
    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return get_peft_model(GPT2LMHeadModel(config), adapter)


def prompted() -> Any:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(base_model("causal"), config)


MODELS: dict[str, tuple[Any, str]] = {
    "classes": (lambda: peft_model("classes", dora=False), "classes"),
    "tokens": (lambda: peft_model("tokens", dora=False), "tokens"),
    "causal": (lambda: peft_model("causal", dora=False), "causal"),
    "GPT-2": (gpt2, "causal"),
    "of no listed class": (home_made, "causal"),
    "a trained prompt": (prompted, "causal"),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_example_has_the_loss_of_a_batch_of_one(name: str) -> None:
    torch.manual_seed(0)
    make, kind = MODELS[name]
    model, batch = make().eval(), batch_of(kind)
    if kind != "classes":
        batch["labels"][0, 2:4] = batch["labels"][3, :3] = -100
    losses = example_losses(model, batch)
    torch.testing.assert_close(losses, alone(model, batch))
    numbers = torch.arange(5)
    equal = {
        Mixture(model, SourceWeights(dict.fromkeys("abcde", 1))): {"source": numbers},
        Weighted(model, SampleWeights(5)): {"index": numbers},
    }
    for level, numbered in equal.items():
        metrics = level.loss({**batch, **numbered})
        factor = 0.5 if isinstance(level, Weighted) else 1.0
        torch.testing.assert_close(metrics["loss"], factor * losses.mean())


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_what_it_is_to_the_model(side: str) -> None:
    """On the right it changes no loss."""
    model, batch = peft_model("causal", dora=False).eval(), batch_of("causal", 3)
    place = slice(0, 4) if side == "right" else slice(3, 7)
    fill = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    padded = {k: torch.full((3, 7), value) for k, value in fill.items()}
    for name, rows in padded.items():
        rows[:, place] = batch[name][:, :4]
    short = {k: v[:, :4] for k, v in batch.items()} if side == "right" else padded
    torch.testing.assert_close(example_losses(model, padded), alone(model, short))


class Tokenizer:
    """What `DataCollatorForSeq2Seq` asks of one."""

    padding_side, pad_token_id = "right", 0

    def pad(self, features: Any, **_: Any) -> dict[str, Any]:
        return {k: torch.tensor([row[k] for row in features]) for k in features[0]}


def test_sequence_to_sequence_labels_are_not_shifted() -> None:
    model = peft_model("seq2seq", dora=False).eval()
    collate = DataCollatorForSeq2Seq(Tokenizer(), model)
    batch = dict(collate([dict(row) for row in data("seq2seq", 4)]))
    assert "decoder_input_ids" in batch
    expected = alone(model, {k: batch[k] for k in ("input_ids", "attention_mask", "labels")})
    torch.testing.assert_close(example_losses(model, batch), expected)


def test_no_label_at_all_is_no_loss() -> None:
    model, batch = peft_model("causal", dora=False).eval(), batch_of("causal")
    batch["labels"][1] = -100
    losses = example_losses(model, batch)
    assert losses[1] == 0
    losses.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_at_least_of_single_precision(dtype: Any) -> None:
    model, batch = peft_model("causal", dora=False).eval().to(dtype), batch_of("causal")
    losses = example_losses(model, batch)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    pairs = zip(logits, batch["labels"])
    expected = torch.stack([cross_entropy(row[:-1].double(), each[1:]) for row, each in pairs])
    torch.testing.assert_close(losses.detach(), expected.to(losses.dtype), rtol=1e-6, atol=0)


def test_columns_of_the_weights_do_not_reach_the_model() -> None:
    model, batch = peft_model(dora=False).eval(), batch_of("classes")
    more = {**batch, "index": torch.arange(5), "source": torch.zeros(5, dtype=torch.long)}
    assert torch.equal(example_losses(model, more), example_losses(model, batch))
    assert torch.equal(HeldOut(model, nn.Linear(1, 1)).loss(more), model(**batch).loss)


def test_labels_that_are_no_classes_are_named() -> None:
    model, batch = peft_model(dora=False), batch_of("classes")
    labels = {"labels": torch.zeros(5)}, {"labels": torch.zeros(5, 6, dtype=torch.long)}
    del batch["labels"]
    for rows, message in (
        (batch, r"labels.*attention_mask.*input_ids"),
        (None, r"labels.*NoneType"),
        (batch | labels[0], "float32"),
        (batch | labels[1], r"\(5, 6\).*\(5, 3\)|no loss for a batch"),
    ):
        with pytest.raises(ProblemError, match=message):
            example_losses(model, rows)
    with pytest.raises(ProblemError, match=r"labels.*attention_mask"):
        HeldOut(model, nn.Linear(1, 1)).loss(batch)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, r"'index'.*'labels'.*remove_unused_columns"),
        (torch.tensor([1, 4]), "index.* 4.*training example"),
        (torch.tensor([-1, 2]), "index.*-1"),
        (torch.tensor([0.0, 1.0]), "index.*float32"),
        (torch.tensor([[0, 1]]), "index"),
        ([0, 1], "index.*list"),
        (torch.tensor([0, 1, 2]), r"index.*\(3,\).*\(2,\)"),
    ],
)
def test_a_column_of_numbers_is_checked(values: Any, message: str) -> None:
    batch: dict[str, Any] = {"labels": torch.zeros(2)}
    good = torch.tensor([3, 0])
    assert torch.equal(column({**batch, "index": good}, "index", 4, "training example"), good)
    if values is not None:
        batch["index"] = values
    with pytest.raises(ProblemError, match=message):
        column(batch, "index", 4, "training example")


def test_weights_of_another_shape_are_refused() -> None:
    """They would broadcast to a weight for each pair of examples."""

    class Column(nn.Module):
        def forward(self, losses: Any, batch: Any) -> Any:
            return torch.ones(len(losses), 1)

    with pytest.raises(ProblemError, match=r"Column: .* 5 examples.*\(5, 1\)"):
        Weighted(peft_model(dora=False), Column()).loss(batch_of("classes"))
