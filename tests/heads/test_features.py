"""Features: what a model makes of rows before its head."""

from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import default_data_collator

from hyperopt_peft import ProblemError
from hyperopt_peft.heads.features import Features, features_of
from hyperopt_peft.utils.models import base_model
from tests.support import trainers
from tests.support.trainers import LENGTH, data, longest_first, padded, peft_model, ragged

PADDED = padded(data(rows=10))


def of(kind: str, rows: Dataset, **options: Any) -> Features:
    return features_of(peft_model(kind), rows, default_data_collator, batch_size=7, **options)


def test_a_row_is_the_mean_of_its_tokens_without_dropout() -> None:
    """Of three layers; padding does not count, and model and random state are as they were."""
    rows, model = PADDED, peft_model("classes").train()
    before = torch.get_rng_state()
    made = features_of(model, rows, default_data_collator, batch_size=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(each.training for each in model.modules())
    model.eval()
    for row in range(len(rows)):
        ids = torch.tensor([rows[row]["input_ids"][: row % LENGTH + 1]])
        layers = base_model(model).bert(ids, output_hidden_states=True).hidden_states
        last = len(layers) - 1
        chosen = [layers[k][0].mean(0) for k in sorted({last // 3, 2 * last // 3, last})]
        torch.testing.assert_close(made.x[row], torch.cat(chosen))
    assert made.labels.tolist() == rows["labels"][:] and made.row.tolist() == list(range(10))


def test_a_token_has_what_the_model_s_own_head_reads() -> None:
    """And tokens that are not scored have nothing."""
    rows, model = ragged("tokens", 9), peft_model("tokens", dropout=0.0).eval()
    made = of("tokens", rows)
    batch = default_data_collator(list(rows))
    scored = batch["labels"] != -100
    logits = model(**batch).logits[scored]
    torch.testing.assert_close(base_model(model).classifier(made.x[:, -8:]), logits)
    assert torch.equal(made.labels, batch["labels"][scored])
    assert torch.equal(made.row, scored.nonzero()[:, 0])


def test_rows_that_a_collator_moves_or_leaves_out_are_refused() -> None:
    """Where each row has a class, and where each token has."""
    with pytest.raises(ProblemError, match="data_collator: returns its rows in another order"):
        features_of(peft_model(), PADDED, longest_first)
    for kind in ("classes", "tokens", "regression"):
        with pytest.raises(ProblemError, match="data_collator: leaves 9 rows as 8"):
            features_of(peft_model(kind), data(kind, 9), lambda x: default_data_collator(x[1:]))


def test_a_tuned_prompt_s_states_are_left_out() -> None:
    config = PromptTuningConfig("TOKEN_CLS", num_virtual_tokens=3)
    model = get_peft_model(trainers.base_model("tokens", dropout=0.0), config)
    made = features_of(model, ragged("tokens", 9), default_data_collator)
    assert made.x.shape == (len(made.labels), 24)


def test_numbers_and_several_labels_a_row() -> None:
    numbers = data("regression", 5)
    made = of("regression", numbers)
    assert torch.equal(made.labels, torch.tensor(numbers["labels"][:]))
    several = data("classes", 5).remove_columns("labels")
    several = several.add_column("labels", [[1.0, 0.0, 1.0]] * 5)
    made = of("classes", several)
    assert made.x.shape == (5, 24) and made.labels.shape == (5, 3)


def test_an_encoder_decoder_s_states_are_the_encoder_s() -> None:
    class Classifier(nn.Module):
        """T5 with a class a row."""

        def __init__(self) -> None:
            super().__init__()
            self.model = trainers.base_model("seq2seq")

        def forward(self, input_ids: Any, attention_mask: Any, **options: Any) -> Any:
            return self.model(input_ids, attention_mask, decoder_input_ids=input_ids, **options)

    model = Classifier()
    made = features_of(model, PADDED, default_data_collator)
    model.eval()
    states = model.model.encoder(torch.tensor([PADDED[2]["input_ids"][:3]])).last_hidden_state
    torch.testing.assert_close(made.x[2, -8:], states[0].mean(0))


def test_standardized_features_have_mean_0_and_deviation_1() -> None:
    x = torch.randn(20, 3) * torch.tensor([1.0, 5.0, 0.0]) + 2  # the last one is constant
    made = Features(x, torch.zeros(20), torch.arange(20)).standardized()
    torch.testing.assert_close(made.x.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-5)
    expected = torch.tensor([1.0, 1.0, 0.0]).double()
    torch.testing.assert_close(made.x.std(0, correction=0), expected, rtol=0, atol=1e-5)


def test_chosen_rows_are_those_of_the_data() -> None:
    made = Features(torch.arange(5.0)[:, None], torch.arange(5), torch.tensor([0, 0, 2, 3, 3]))
    chosen = made.select(torch.tensor([3, 0]))
    assert chosen.labels.tolist() == [0, 1, 3, 4] and chosen.row.tolist() == [0, 0, 3, 3]


def test_features_have_the_precision_of_the_passes() -> None:
    half = partial(torch.autocast, "cpu", torch.bfloat16)
    exact, rounded = of("classes", PADDED), of("classes", PADDED, precision=half)
    assert not torch.equal(exact.x, rounded.x)
    torch.testing.assert_close(exact.x, rounded.x, rtol=0.1, atol=0.1)


class Pooled(nn.Module):
    """Returns logits alone, as a convolution's features have no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Any, attention_mask: Any, output_hidden_states: bool) -> Any:
        return {"logits": input_ids.float()}


@pytest.mark.parametrize(
    ("model", "rows", "named"),
    [
        (Pooled(), data("classes", 4), "Pooled: returns no states"),
        (peft_model(), data("classes", 4).remove_columns("labels"), "labels: a head needs"),
        (peft_model("seq2seq"), data("seq2seq", 4), "no loss for a batch.*DataCollatorForSeq2Seq"),
        (
            peft_model(),
            data("classes", 4).remove_columns("labels").add_column("labels", [[1, 0, 1]] * 4),
            r"labels: have the shape \(4, 3\)",
        ),
    ],
)
def test_what_has_no_features_is_named(model: Any, rows: Dataset, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        features_of(model, rows, default_data_collator)
