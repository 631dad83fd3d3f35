"""Losses of labels and rows add up to the model's own; weighted rows by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    default_data_collator,
)

from hyperopt_peft import ProblemError
from hyperopt_peft.core import logits as of_logits
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.labels import (
    counts_of_labels,
    label_losses,
    label_weights,
    labels_are_shifted,
    row_losses,
)
from hyperopt_peft.core.logits import losses_of_logits
from hyperopt_peft.utils.random_state import RandomState
from tests.support.language import fuse_head, language_model
from tests.support.trainers import base_model, data, peft_model

SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDE = SMALL | {"intermediate_size": 16, "num_key_value_heads": 2}


class RemoteCausal(nn.Module):
    """A causal model as remote code defines one: of no known class, with a loss of its own."""

    def __init__(self, shift: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        self.shift, self.scale = shift, scale
        self.embed, self.drop, self.head = nn.Embedding(20, 8), nn.Dropout(0.5), nn.Linear(8, 20)

    def forward(self, input_ids: Any, labels: Any = None) -> Any:
        logits = self.head(self.drop(self.embed(input_ids)))
        if labels is None:
            return SimpleNamespace(logits=logits)
        length = labels.shape[1] - self.shift
        loss = cross_entropy(logits[:, :length].flatten(0, 1), labels[:, self.shift :].flatten())
        return SimpleNamespace(loss=self.scale * loss, logits=logits)


MODELS: dict[str, tuple[Any, bool]] = {
    "GPT-2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)),
        True,
    ),
    "Llama": (lambda: LlamaForCausalLM(LlamaConfig(**WIDE)), True),
    "Gemma-3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**WIDE, head_dim=8)), True),
    "BERT masked": (lambda: BertForMaskedLM(BertConfig(**SMALL, intermediate_size=16)), False),
    "T5": (lambda: base_model("seq2seq"), False),
    "remote causal": (RemoteCausal, True),
    "remote masked": (lambda: RemoteCausal(shift=0), False),
}


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids, labels = torch.randint(3, 20, (3, 6)), torch.randint(3, 20, (3, 6))
    labels[0, :3] = labels[2, 4:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("head", ["random", "zero", "frozen"])
def test_the_loss_says_whether_labels_are_shifted(kind: str, head: str) -> None:
    """Also where all logits are equal, and where no parameter has a gradient."""
    make, shifted = MODELS[kind]
    model = make()
    if head == "zero":
        for parameter in model.parameters():
            parameter.data.zero_()
    model.requires_grad_(head != "frozen")
    assert labels_are_shifted(model, batch()) is shifted


@pytest.mark.parametrize("kind", MODELS)
def test_row_losses_add_up_to_the_models_own_loss(kind: str) -> None:
    model, rows = MODELS[kind][0]().eval(), batch()
    inputs = dict(rows)
    if kind == "T5":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(rows["labels"])
    sums, counts = row_losses(model, inputs)
    torch.testing.assert_close(sums.sum() / counts.sum(), model(**inputs).loss)
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).loss
        torch.testing.assert_close(sums[row] / counts[row], alone)
    losses, scored = label_losses(model, inputs)
    assert losses.shape == rows["labels"].shape and not losses[~scored].any()
    expected = rows["labels"] != -100
    expected[:, 0] &= not MODELS[kind][1]
    assert torch.equal(scored, expected)
    one = {**inputs, "labels": torch.full_like(rows["labels"], -100)}
    one["labels"][1, 3] = rows["labels"][1, 3]  # the label whose loss stands in its place
    torch.testing.assert_close(losses[1, 3], model(**one).loss)


@pytest.mark.parametrize("shifted", [True, False])
def test_chunks_of_logits_change_no_derivative(shifted: bool, monkeypatch: Any) -> None:
    """Of first and second order; a chunk of two positions, and a last one of one."""
    torch.manual_seed(0)
    logits = torch.randn(3, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 4, -100], [-100, -100, -100], [0, 2, 3]])

    def losses(x: torch.Tensor) -> torch.Tensor:
        return losses_of_logits(None, x, labels, shifted=shifted)[0]

    expected = losses(logits)
    direction, along = torch.randn_like(expected), torch.randn_like(logits)
    (gradient,) = torch.autograd.grad(expected, logits, direction)
    monkeypatch.setattr(of_logits, "CHUNK", 10)
    in_chunks = losses(logits)
    (first,) = torch.autograd.grad(in_chunks, logits, direction, create_graph=True)
    (second,) = torch.autograd.grad((first * along).sum(), logits)
    monkeypatch.undo()
    (again,) = torch.autograd.grad(losses(logits), logits, direction, create_graph=True)
    assert torch.equal(in_chunks, expected) and torch.equal(first, gradient)
    assert torch.equal(second, torch.autograd.grad((again * along).sum(), logits)[0])
    assert second.any()


def test_a_fused_head_gives_the_losses_of_the_logits() -> None:
    """Also of rows that TRL's own trainers wrap in an adapter."""
    plain, rows = MODELS["Llama"][0]().eval(), batch()
    expected = label_losses(plain, rows)
    fused = MODELS["Llama"][0]().eval()
    fused.load_state_dict(plain.state_dict())
    fuse_head(fused)
    for model in (fused, get_peft_model(fused, LoraConfig(target_modules=["q_proj"]))):
        losses, scored = label_losses(model, rows)
        torch.testing.assert_close(losses, expected[0])
        assert torch.equal(scored, expected[1]) and labels_are_shifted(model, rows)


def test_asking_changes_nothing() -> None:
    model = RemoteCausal().train()
    model.embed.eval()
    rows = batch()
    state = RandomState.capture()
    labels_are_shifted(model, rows)
    assert torch.equal(torch.get_rng_state(), state.states["cpu"])
    assert [m.training for m in model.modules()] == [True, False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_without_scored_labels_decides_too() -> None:
    model, rows = RemoteCausal(), batch() | {"labels": torch.full((3, 6), -100)}
    assert labels_are_shifted(model, rows)
    sums, counts = row_losses(model, rows)
    assert not sums.any() and not counts.any()


def test_a_trained_prompt_scores_the_first_label_too() -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, rows = get_peft_model(MODELS["GPT-2"][0](), prompt).eval(), batch()
    rows["labels"][1, 0] = 5
    sums, counts = row_losses(model, rows)
    assert counts.tolist() == [3, 6, 4]
    torch.testing.assert_close(sums.sum() / counts.sum(), model(**rows).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_losses_are_at_least_of_single_precision(dtype: Any) -> None:
    losses, _ = label_losses(MODELS["Llama"][0]().eval().to(dtype), batch())
    assert losses.dtype == torch.promote_types(dtype, torch.float32)


def test_labels_of_rows_are_not_shifted() -> None:
    model = BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=16))
    assert not labels_are_shifted(model, batch() | {"labels": torch.tensor([0, 1, 0])})


class OfWeights(nn.Module):
    """A classifier of rows or tokens whose loss has a weight for each class."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.embed, self.head, self.tokens = nn.Embedding(20, 8), nn.Linear(8, 3), tokens

    def forward(self, input_ids: Any, labels: Any = None) -> Any:
        logits = self.head(self.embed(input_ids))
        logits = logits if self.tokens else logits.mean(1)
        if labels is None:
            return SimpleNamespace(logits=logits)
        weights = torch.tensor([1.0, 1.5, 2.0])
        loss = cross_entropy(logits.flatten(0, -2), labels.flatten(), weights)
        return SimpleNamespace(loss=loss, logits=logits)


def of_one_class(tokens: bool) -> dict[str, torch.Tensor]:
    """The first batch of sorted rows."""
    ids = batch()["input_ids"]
    return {"input_ids": ids, "labels": torch.zeros_like(ids if tokens else ids[:, 0])}


@pytest.mark.parametrize(
    ("model", "rows", "message"),
    [
        (RemoteCausal(shift=2), batch(), "neither"),
        (RemoteCausal(scale=2.0), batch(), "mean over labels"),
        (OfWeights(tokens=False), of_one_class(tokens=False), "mean over labels"),
        (OfWeights(tokens=True), of_one_class(tokens=True), "mean over labels"),
        # Without labels T5 asks for the decoder's input.
        (base_model("seq2seq"), batch(), "DataCollatorForSeq2Seq"),
    ],
    ids=["two tokens ahead", "twice the mean", "weights of rows", "weights of tokens", "T5"],
)
def test_losses_that_cannot_be_given_by_row_are_refused(
    model: Any, rows: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ProblemError, match=message):
        row_losses(model, rows)


@pytest.mark.parametrize("fused", [False, True])
def test_an_auxiliary_loss_has_no_rows(fused: bool) -> None:
    model = language_model(experts=4, output_router_logits=True, router_aux_loss_coef=1e-3)
    if fused:
        fuse_head(model)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(ProblemError, match="router_aux_loss_coef"):
        row_losses(model, batch)
    model.config.router_aux_loss_coef = 0.0
    assert row_losses(model, batch)[1].tolist() == [2, 2]


def levels(kind: str = "causal") -> tuple[Any, Any, Any, Any]:
    """A model in float64, a level with a weight for each of 6 rows, its logits, and a batch."""
    model = peft_model(kind, dropout=0.0, dora=False).double()
    batch = default_data_collator([dict(row) for row in data(kind, 6, seed=1)])
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    lower = WeightedRows(model, lambda batch: logits[batch["index"]].exp(), tags=["index"])
    if kind == "causal":
        batch["labels"][1, :3] = batch["labels"][2, 3:] = -100
    return model, lower, logits, {**batch, "index": torch.tensor([3, 0, 5, 1, 2, 4])}


@pytest.mark.parametrize("kind", ["causal", "classes"])
@pytest.mark.parametrize("of_labels", [False, True])
def test_the_loss_is_the_weighted_sum_by_the_number_of_labels(kind: str, of_labels: bool) -> None:
    model, lower, logits, batch = levels(kind)
    inputs = {name: value for name, value in batch.items() if name != "index"}
    if of_labels:
        batch["index"] = torch.arange(batch["labels"].numel()).view_as(batch["labels"]) % 6
    losses, scored = label_losses(model, inputs)
    index = batch["index"] if of_labels or kind == "classes" else batch["index"][:, None]
    expected = (logits.exp()[index] * losses).sum() / scored.sum()
    torch.testing.assert_close(lower.loss(batch)["loss"], expected)
    plain = lower.loss(batch)["task_loss"]
    torch.testing.assert_close(plain, model(**inputs).loss, check_dtype=False)


def test_unequal_micro_batches_of_a_trainer_make_the_loss_of_all() -> None:
    _, lower, _, batch = levels()
    parts = [{name: x[chosen] for name, x in batch.items()} for chosen in ([0], [1, 2, 3, 4, 5])]
    entries = label_weights(counts_of_labels(parts, shifted=True) or [])
    each = [lower.loss({**p, **e})["loss"] for p, e in zip(parts, entries, strict=True)]
    torch.testing.assert_close(sum(each) / 2, lower.loss(batch)["loss"])


def test_weights_of_other_rows_are_refused() -> None:
    """A padding-free batch is one row, over which weights of rows must not be broadcast."""
    _, lower, _, batch = levels()
    flat = {name: x.view(1, -1) for name, x in batch.items() if name != "index"}
    with pytest.raises(ProblemError, match=r"\(6,\).*\(1, 36\)"):
        lower.loss({**flat, "index": batch["index"]})
