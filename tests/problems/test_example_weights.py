"""The losses of single examples are those that the model itself has for each of them alone."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel

from hyperopt_peft import ProblemError
from hyperopt_peft.problems.example_weights import HeldOut, column, example_losses
from tests.support.trainers import base_model, data, peft_model


def batch_of(kind: Any, rows: int = 5) -> dict[str, Any]:
    part = data(kind, rows)
    return {name: torch.tensor(part[name][:]) for name in part.column_names}


def alone(model: nn.Module, batch: Any) -> Any:
    """The model's own loss on each example as a batch of one."""
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
    return torch.stack([model(**row).loss for row in rows])


@pytest.mark.parametrize("kind", ["classes", "tokens", "causal"])
def test_each_example_has_the_loss_of_a_batch_of_one(kind: str) -> None:
    model, batch = peft_model(kind, dora=False).eval(), batch_of(kind)
    if kind != "classes":
        batch["labels"][0, 2:4] = batch["labels"][3, :3] = -100
    found = example_losses(model, batch)
    torch.testing.assert_close(found, alone(model, batch))
    assert found.shape == (5,)


def padded(batch: Any, side: Any) -> Any:
    """The first four tokens of ``batch``, and three of padding."""
    place = slice(0, 4) if side == "right" else slice(3, 7)
    values = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    values = {k: torch.full((len(batch[k]), 7), value) for k, value in values.items()}
    for name, rows in values.items():
        rows[:, place] = batch[name][:, :4]
    return values


def test_padding_changes_no_loss() -> None:
    model, batch = peft_model("causal", dora=False).eval(), batch_of("causal", 3)
    expected = example_losses(model, {k: v[:, :4] for k, v in batch.items()})
    torch.testing.assert_close(example_losses(model, padded(batch, "right")), expected)


def test_padding_on_the_left_is_what_it_is_to_the_model() -> None:
    model, batch = peft_model("causal", dora=False).eval(), batch_of("causal", 3)
    batch = padded(batch, "left")
    torch.testing.assert_close(example_losses(model, batch), alone(model, batch))


def test_a_causal_model_need_not_be_called_one() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel(config), adapter).eval()
    batch = batch_of("causal")
    torch.testing.assert_close(example_losses(model, batch), alone(model, batch))


def test_a_trained_prompt_is_not_scored() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(base_model("causal"), config).eval()
    batch = batch_of("causal")
    torch.testing.assert_close(example_losses(model, batch), alone(model, batch))


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
    expected = [
        cross_entropy(row[:-1].double(), labels[1:]) for row, labels in zip(logits, batch["labels"])
    ]
    expected = torch.stack(expected).to(losses.dtype)
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-6, atol=0)


def test_columns_of_the_weights_do_not_reach_the_model() -> None:
    model, batch = peft_model(dora=False).eval(), batch_of("classes")
    more = {**batch, "index": torch.arange(5), "source": torch.zeros(5, dtype=torch.long)}
    assert torch.equal(example_losses(model, more), example_losses(model, batch))
    weights = torch.nn.Linear(1, 1)
    assert torch.equal(HeldOut(model, weights).loss(more), model(**batch).loss)


def test_labels_that_are_no_classes_are_named() -> None:
    model, batch = peft_model(dora=False), batch_of("classes")
    del batch["labels"]
    for level_loss in (
        HeldOut(model, torch.nn.Linear(1, 1)).loss,
        lambda b: example_losses(model, b),
    ):
        with pytest.raises(ProblemError, match=r"labels.*attention_mask.*input_ids"):
            level_loss(batch)
        with pytest.raises(ProblemError, match=r"labels.*NoneType"):
            level_loss(None)
    with pytest.raises(ProblemError, match="float32"):
        example_losses(model, {**batch, "labels": torch.zeros(5)})
    with pytest.raises(ProblemError, match="labels"):
        example_losses(model, {**batch, "labels": torch.zeros(5, 6, dtype=torch.long)})


def test_a_column_of_numbers_is_checked() -> None:
    def read(values: Any) -> Any:
        return column({"index": values, "labels": 0}, "index", 4, "training example")

    assert torch.equal(read(torch.tensor([3, 0])), torch.tensor([3, 0]))
    with pytest.raises(ProblemError, match=r"'index'.*'labels'.*remove_unused_columns"):
        column({"labels": 0}, "index", 4, "training example")
    for values, found in (
        (torch.tensor([1, 4]), "index.* 4.*training example"),
        (torch.tensor([-1, 2]), "index.*-1"),
        (torch.tensor([0.0, 1.0]), "index.*float32"),
        (torch.tensor([[0, 1]]), "index"),
        ([0, 1], "index.*list"),
    ):
        with pytest.raises(ProblemError, match=found):
            read(values)
