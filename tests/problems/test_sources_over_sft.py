"""`SourceTrainer` over TRL's trainers: each label has its source, in every layout of the data."""

import random
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback

from hyperopt_peft import ProblemError, hypergradient
from hyperopt_peft.core.labels import label_losses
from hyperopt_peft.problems import SourceTrainer
from hyperopt_peft.problems.example_weights import COLUMNS, without
from hyperopt_peft.problems.source_collator import SourceCollator
from tests.support import language
from tests.support.resume import require_same_end

trl = pytest.importorskip("trl")
SFT = SourceTrainer.over(trl.SFTTrainer)

LAYOUTS = {**language.LAYOUTS, "flat": {"padding_free": True, "max_length": None}}
SOURCES = ("web", "forum", "trusted")


def spelled(value: Any, letters: str) -> Any:
    """``value`` with its letters replaced by some of ``letters``."""
    if isinstance(value, str):
        pattern = rf"\b[{language.LETTERS}]\b"
        return re.sub(pattern, lambda m: letters[ord(m[0]) % len(letters)], value)
    if isinstance(value, list):
        return [spelled(each, letters) for each in value]
    if isinstance(value, dict):
        return {name: spelled(each, letters) for name, each in value.items()}
    return value


def rows(source: str, layout: str = "completion", count: int = 12) -> Dataset:
    """Rows whose letters no other source has."""
    number = SOURCES.index(source)
    letters = language.LETTERS[5 * number : 5 * number + 5]
    table = language.rows(layout, count, seed=number).to_list()
    return Dataset.from_list(spelled(table, letters))


def trainer(
    folder: Path,
    callbacks: Sequence[Any] = (),
    *,
    layout: str = "completion",
    kind: Any = SFT,
    model: Any = None,
    data: Any = None,
    options: Any = None,
    **settings: Any,
) -> Any:
    """Two sources and the trusted rows; ``settings`` are arguments, ``options`` the trainer's."""
    common = {
        "hypergradient": "darts:product=dots",
        "max_steps": 4,
        "lower_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "upper_learning_rate": 0.3,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        **LAYOUTS.get(layout, {}),
    }
    web, forum, trusted = data or (rows(source, layout) for source in SOURCES)
    made = kind(
        language.language_model() if model is None else model,
        kind.Arguments(str(folder), **{**common, **settings}),
        sources={"web": web, "forum": forum},
        trusted=trusted,
        callbacks=list(callbacks),
        processing_class=language.tokenizer(),
        **{"peft_config": language.lora(), **(options or {})},
    )
    made.remove_callback(PrinterCallback)
    return made


def batch_of_all(run: Any, data: Any) -> Any:
    """All rows of ``data`` as one batch."""
    return run.data_collator([data[row] for row in range(len(data))])


def of_source(run: Any, batch: Any, number: int) -> Any:
    """The summed loss of a source's labels, on its own."""
    losses, _ = label_losses(run.model, without(batch, COLUMNS))
    return losses[batch["source"] == number].sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_label_has_its_source(tmp_path: Path, layout: str) -> None:
    """f = Σ v_k(t) ℓ_t / N, at equal weights the loss of SFTTrainer, and its mixed derivative."""
    run = trainer(tmp_path, layout=layout)
    run.model.eval()
    batch = batch_of_all(run, run.train_dataset)
    source = batch["source"]
    tokens = language.tokenizer().convert_ids_to_tokens(batch["input_ids"].flatten())
    for token, number in zip(tokens, source.flatten().tolist(), strict=True):
        assert token not in language.LETTERS or language.LETTERS.index(token) // 5 == number
    losses, scored = label_losses(run.model, without(batch, COLUMNS))
    assert source[scored].bincount().tolist() == run.weights.counts.tolist()
    torch.testing.assert_close(run.lower.loss(batch)["loss"], run.task_loss(batch))
    torch.nn.init.normal_(run.weights.logits)
    expected = (run.weights()[source] * losses).sum() / scored.sum()
    torch.testing.assert_close(run.lower.loss(batch)["loss"], expected)

    held_out, w = batch_of_all(run, run.upper_dataset), run.lower.variables
    goal = torch.autograd.grad(run.task_loss(held_out), w)
    sums = [torch.autograd.grad(of_source(run, batch, k), w) for k in range(3)]
    dots = torch.stack([sum((a * b).sum() for a, b in zip(each, goal)) for each in sums])
    value = run.upper.prior(run.upper.variables) - (run.weights() * dots).sum() / scored.sum()
    (expected,) = torch.autograd.grad(value, run.weights.logits)
    data = {"upper_batch": held_out, "lower_batch": batch}
    (slope,) = hypergradient(run.upper, run.lower, "darts:xi=1.0,product=dots", **data)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("layout", ["packed", "flat"])
def test_packs_have_the_hypergradient_of_their_rows(tmp_path: Path, layout: str) -> None:
    slopes = []
    for each in ("text", layout):
        run = trainer(tmp_path, layout=each)
        run.model.eval()
        data = {
            "upper_batch": batch_of_all(run, run.upper_dataset),
            "lower_batch": batch_of_all(run, run.train_dataset),
        }
        slopes += hypergradient(run.upper, run.lower, "darts:xi=1.0,product=dots", **data)
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-7)


def test_a_collator_that_joins_rows_in_another_way_is_refused() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    rows = [{"input_ids": [5, 6], "source": 0}, {"input_ids": [7, 8], "source": 1}]
    for made in (ids, ids.expand(3, 3)):
        with pytest.raises(ProblemError, match=r"source.* of 2 rows with 4 tokens"):
            SourceCollator(lambda _, made=made: {"labels": made})(rows)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_type": "dft"}, "the loss of the first batch .* the mean over its labels"),
        ({"packing": True, "eval_packing": False}, "eval_packing: .*leave it out"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: .* SourceTrainer"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, options: Any, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        trainer(tmp_path, **options)


def test_a_loss_of_pairs_has_no_sources(tmp_path: Path) -> None:
    over_pairs = SourceTrainer.over(trl.DPOTrainer)
    with pytest.raises(ProblemError, match=r"SourceDPOTrainer: the batches have .* and no labels"):
        trainer(tmp_path, kind=over_pairs, layout="preference")


def noisy() -> list[Dataset]:
    """All prompts differ; ``web`` and trusted rows answer alike, ``forum`` at random."""
    pairs, letters = iter(product(language.LETTERS, repeat=2)), random.Random(0)
    tables = []
    for count, noise in ((48, False), (48, True), (16, False)):
        made = []
        for _ in range(count):
            prompt = "say {} then {}".format(*next(pairs))
            answer = letters.choices(language.LETTERS, k=3) if noise else "abc"
            made.append({"prompt": prompt, "completion": " " + " ".join(answer)})
        tables.append(Dataset.from_list(made))
    return tables


#: An adapter that begins as no change, from which a few steps learn an answer.
PLAIN = {"peft_config": language.lora(init_lora_weights=True, r=4)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True, "gradient_checkpointing": True}, {"packing": True, "max_length": 24}],
    ids=["float32", "bfloat16 and checkpointing", "packing"],
)
def test_a_source_of_noise_loses(tmp_path: Path, settings: Any) -> None:
    settings = {"max_steps": 40, "gradient_accumulation_steps": 4, "logging_steps": 10, **settings}
    run = trainer(tmp_path, data=noisy(), options=PLAIN, learning_rate=2e-2, **settings)
    run.train()
    web, forum, of_trusted = run.weights().tolist()
    assert web > 3 * forum and of_trusted > 3 * forum
    records = [record for record in run.state.log_history if "upper_loss" in record]
    assert records[-1]["upper_loss"] < records[0]["upper_loss"]
    shares = [records[-1][f"lower_share_{name}"] for name in SOURCES]
    assert sum(shares) == pytest.approx(1) and "upper_snr" in records[-1]


@pytest.mark.slow
def test_it_resumes(tmp_path: Path) -> None:
    require_same_end(
        tmp_path,
        (4,),
        make=trainer,
        layout="packed",
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        logging_steps=3,
    )


def test_a_model_by_name_gets_its_adapter(tmp_path: Path) -> None:
    language.language_model().save_pretrained(tmp_path / "model")
    language.tokenizer().save_pretrained(tmp_path / "model")
    run = trainer(tmp_path, model=str(tmp_path / "model"), max_steps=2)
    run.train()
    assert len(run.lower.variables) > 0 and run.weights.logits.any()
