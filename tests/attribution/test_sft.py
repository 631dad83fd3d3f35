"""`attribute` of TRL's SFTTrainer: its token loss is the rows', and nothing else of TRL's is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from hyperopt_peft import ProblemError
from tests.support.attributed import attributed, error, error_of_slopes, require_equal
from tests.support.language import lora, quantised, rows, tokenizer, with_logits
from tests.support.trainers import QUIET

over_trl = pytest.importorskip("tests.support.over_trl")
pytestmark = with_logits

SETTINGS: dict[str, Any] = {**QUIET, "max_steps": 3, "per_device_train_batch_size": 3}
SETTINGS |= {"per_device_eval_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2}
SETTINGS["bf16"] = False


def gpt2() -> GPT2LMHeadModel:
    """In float64 throughout, which Llama is not: its norms are in float32."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer()), n_embd=8, n_layer=2, n_head=2, n_positions=32)
    config.initializer_range, config.eos_token_id, config.bos_token_id = 0.5, 1, 1
    return GPT2LMHeadModel(config).double()


def sft(folder: Path, layout: str = "completion", *, args: Any = (), **options: Any) -> Any:
    """An SFTTrainer with TRL's defaults, in float32."""
    sets = {"train_dataset": rows(layout, 7), "eval_dataset": rows(layout, 4, seed=1)}
    made, kind, settings = over_trl.made, over_trl.SFTTrainer, {**SETTINGS, **dict(args)}
    return made(folder, kind, None, layout, options=sets | options, **settings)


def test_scores_are_slopes_of_retraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, with accumulation, clipping, dropout of the adapter and checkpointing."""
    # TRL's head is in float32.
    monkeypatch.setattr("hyperopt_peft.core.labels.has_fused_head", lambda model: False)
    adapter = lora(target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
    trainer = sft(
        tmp_path,
        model=gpt2(),
        peft_config=adapter,
        args={"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "max_steps": 2},
    )
    trainer.model.double()
    result = attributed(trainer)
    assert error_of_slopes(result) < 1e-6


@pytest.mark.parametrize("layout", ["completion", "messages"])
def test_scores_are_those_of_a_stock_trainer_with_the_same_tokens(
    tmp_path: Path, layout: str
) -> None:
    trainer, plain = sft(tmp_path, layout), {}
    for name in ("train_dataset", "eval_dataset"):
        batches = [trainer.data_collator([row]) for row in getattr(trainer, name)]
        plain[name] = [{k: b[k][0].tolist() for k in ("input_ids", "labels")} for b in batches]
    model, args = sft(tmp_path, layout).model, TrainingArguments(str(tmp_path), **SETTINGS)
    stock = Trainer(model, args, data_collator=DataCollatorForSeq2Seq(tokenizer()), **plain)
    scores, expected = attributed(trainer).scores, attributed(stock).scores
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_the_run_is_the_trainers_own(tmp_path: Path) -> None:
    plain, watched = sft(tmp_path), sft(tmp_path)
    plain.train()
    result = attributed(watched)
    assert result.columns.keys() == {"prompt", "completion"}
    require_equal(watched.model, plain.model, 1e-4)
    shown, again = plain.evaluate(), watched.evaluate()
    assert result.value == pytest.approx(shown["eval_loss"], rel=1e-4)
    counted = {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"}
    for name in counted & shown.keys():  # some are others in older releases
        assert again[name] == pytest.approx(shown[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("name", "others", "rounding"),
    [("padding_free", {"max_length": None}, 1e-4), ("gradient_checkpointing", {"bf16": True}, 0.0)],
)
def test_joined_rows_and_checkpointing_change_no_score(
    tmp_path: Path, name: str, others: dict[str, Any], rounding: float
) -> None:
    """Checkpointing in bf16, which are TRL's defaults."""
    settings = ({name: on, **others} for on in (True, False))
    one, other = (attributed(sft(tmp_path, args=args)).scores for args in settings)
    assert one.abs().sum() > 0 and error(one, other) <= rounding


def test_a_base_in_4_bits_has_the_scores_of_its_weights(tmp_path: Path) -> None:
    """Where the layers compute in float32."""
    pytest.importorskip("bitsandbytes")
    models = quantised(tmp_path / "model"), quantised(tmp_path / "model").dequantize()
    trainers = [sft(tmp_path, model=model) for model in models]
    scores, expected = (attributed(trainer).scores for trainer in trainers)
    assert error(scores, expected) < 1e-5


BAD: list[tuple[dict[str, Any], str]] = [
    ({"args": {"loss_type": "dft"}}, "row_losses"),
    ({"layout": "packed"}, "packing: the texts in a pack"),
    ({"offloading": True}, "activation_offloading"),
]


@pytest.mark.parametrize(("options", "fragment"), BAD)
def test_bad_input_is_named(tmp_path: Path, options: dict[str, Any], fragment: str) -> None:
    options = dict(options)
    offloading = options.pop("offloading", False)
    trainer = sft(tmp_path, **options)
    trainer.args.activation_offloading = offloading  # without a GPU TRL cannot begin with it
    with pytest.raises(ProblemError, match=fragment):
        attributed(trainer)


def test_a_loss_of_pairs_is_refused(tmp_path: Path) -> None:
    sets = {"eval_dataset": rows("preference", 3, seed=1)}
    trainer = over_trl.made(tmp_path, over_trl.DPOTrainer, options=sets, **SETTINGS)
    with pytest.raises(ProblemError, match=r"DPOTrainer.compute_loss: .*row_losses"):
        attributed(trainer)
