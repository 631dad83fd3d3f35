"""Frozen lower layers that are computed once change no number, or say why they are not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
)

from hyperopt_peft import BiDoRA, BilevelTrainer, Method
from hyperopt_peft.heads import compute_once
from hyperopt_peft.problems import LoRA
from tests.support import language
from tests.support.files import tokenizer
from tests.support.trainers import arguments, data, peft_model, values


def ragged(kind: str) -> Any:
    """Texts of three to six tokens."""
    rows = data(kind)

    def shorter(row: dict[str, Any], number: int) -> dict[str, Any]:
        ends = 3 + number % 4
        return {k: x[:ends] if isinstance(x, list) else x for k, x in row.items()}

    return rows.map(shorter, with_indices=True)


def trainer(
    folder: Path,
    kind: str,
    method: Any = None,
    dropout: float = 0.0,
    settings: Any = None,
    **adapter: Any,
) -> Any:
    """BiDoRA on the upper one of two layers, of texts of unequal lengths."""
    collators = {"classes": DataCollatorWithPadding, "tokens": DataCollatorForTokenClassification}
    collate = collators.get(kind, DataCollatorForTokenClassification)(tokenizer())
    model = peft_model(kind, dropout, **{"layers_to_transform": [1], **adapter})
    options = {"train_dataset": ragged(kind), "data_collator": collate}
    args = arguments(folder, **(settings or {}))
    return BilevelTrainer(model, args, method=method or BiDoRA(), **options)


@pytest.mark.parametrize("kind", ["classes", "tokens", "causal"])
def test_a_training_is_the_same(tmp_path: Path, kind: str) -> None:
    """And the model still has its lower layers, to be merged and saved."""
    found, whole = {}, {}
    for once in (False, True):
        made = trainer(tmp_path, kind)
        if once:
            assert compute_once(made).startswith("1 of 2 layers")
        made.train()
        made.train()  # now every text is known
        found[once], whole[once] = values(made.model), made.model.state_dict().keys()
    assert whole[True] == whole[False]
    for name, expected in found[False].items():
        torch.testing.assert_close(found[True][name], expected, rtol=2e-3, atol=2e-5)


def test_a_copy_of_the_model_gives_its_logits(tmp_path: Path) -> None:
    made = trainer(tmp_path, "classes")
    known, new = (
        dict(next(iter(made.get_eval_dataloader(ragged("classes").select(rows)))))
        for rows in (range(4), range(4, 8))
    )
    with torch.no_grad():
        model = made.model.eval()
        expected = [model(**batch).logits for batch in (known, new)]
        compute_once(made)
        model(**known)
        teacher = copy.deepcopy(model)
        model(**known)
        for batch, logits in zip((new, known, new), (expected[1], *expected), strict=True):
            for each in (teacher, model):
                torch.testing.assert_close(each(**batch).logits, logits)


class Shifted(Method):
    """Its first layer reads a variable that is no parameter."""

    def prepare(self, model: Any) -> None:
        self.shift = torch.zeros(8, requires_grad=True)
        first = model.base_model.model.bert.encoder.layer[0]
        first.register_forward_hook(lambda m, args, states: states + self.shift)

    def upper_variables(self, model: Any) -> Any:
        return {"shift": self.shift}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"layers_to_transform": [0]}, "the lowest one is trained"),
        ({"modules_to_save": ["word_embeddings"]}, "something below"),
        ({"method": Shifted()}, "something below"),
        ({"settings": {"gradient_checkpointing": True}}, "gradient checkpointing"),
    ],
)
def test_why_they_are_not(tmp_path: Path, options: Any, words: str) -> None:
    made = trainer(tmp_path, "classes", **options)
    assert words in compute_once(made)
    made.train()


def test_their_dropout_may_go(tmp_path: Path) -> None:
    made = trainer(tmp_path, "classes", dropout=0.1)
    assert compute_once(made, dropout=False).startswith("1 of 2 layers")
    rates = [m.p for m in made.model.modules() if isinstance(m, nn.Dropout)]
    assert 0.1 in rates


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("absolute", [False, True])
def test_frozen_layers_of_a_decoder(tmp_path: Path, absolute: bool, side: str) -> None:
    """Padding on the left moves a text, which learned positions show and rotary ones do not."""
    last = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
    words, sizes = language.tokenizer(), {"n_embd": 16, "n_layer": 2, "n_head": 2}
    words.padding_side = side
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=len(words), initializer_range=0.2, **sizes, **none)
    rows = language.rows("text", 12).map(lambda row: words(row["text"]), remove_columns="text")
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config) if absolute else language.language_model()
    adapter = {**last, "target_modules": ["c_attn"]} if absolute else last
    model = get_peft_model(base, language.lora(**adapter))
    made = BilevelTrainer(
        model,
        arguments(tmp_path),
        method=LoRA(),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(words, mlm=False),
    )
    batch = made.data_collator([rows[k] for k in range(6)])
    read = batch["attention_mask"].bool()
    plain = model.eval()(**batch).logits[read]
    text = compute_once(made)
    for _ in range(2):
        assert torch.allclose(model.eval()(**batch).logits[read], plain, atol=1e-4)
    refused = "reads more than the text of its row" in text
    assert refused if absolute and side == "left" else "1 of 2 layers are frozen" in text
