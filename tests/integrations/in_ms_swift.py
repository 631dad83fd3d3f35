"""A bilevel trainer over ms-swift's own trainer, with its model, template and rows, on the CPU.

`test_ms_swift` runs these tests, in a process of their own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from swift import get_model_processor, get_template
from swift.dataset import EncodePreprocessor
from swift.trainers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hyperopt_peft import BiDoRA, bilevel
from hyperopt_peft.method import row_losses
from hyperopt_peft.problems import RowWeights
from tests.support.language import LETTERS, language_model, lora, tokenizer
from tests.support.networks import differences
from tests.support.trainers import values

SETTINGS: dict[str, Any] = {
    **{"use_cpu": True, "report_to": "none", "save_strategy": "no", "check_model": False},
    **{"remove_unused_columns": False, "gradient_checkpointing": False, "logging_steps": 1},
    **{"max_steps": 4, "learning_rate": 1e-2, "dataloader_num_workers": 0},
    **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
}


ROLES = ("user", "assistant")


def conversation(k: int) -> dict[str, Any]:
    first, count = f"say {LETTERS[k % 16]} then {LETTERS[k // 16]}", 2 + k % 3
    answer = " ".join(LETTERS[(k + j) % 16] for j in range(count))
    return {"messages": [{"role": r, "content": c} for r, c in zip(ROLES, (first, answer))]}


def run(folder: Path, kind: Any, *, dora: bool = False, upper: int = 0, **options: Any) -> Any:
    """A trained ``kind`` over 24 rows; ``upper`` more for the upper level."""
    for each in (tokenizer(), language_model()):
        each.save_pretrained(folder / "model")
    model, processor = get_model_processor(
        str(folder / "model"), model_type="llama", torch_dtype=torch.float32, device_map="cpu"
    )
    template = get_template(processor, max_length=32, template_type="dummy")
    template.set_mode("train")
    rows = Dataset.from_list([conversation(k) for k in range(24 + upper)])
    rows = EncodePreprocessor(template=template)(rows, num_proc=1, load_from_cache_file=False)
    if upper:
        options["upper_dataset"] = rows.select(range(24, 24 + upper))
    torch.manual_seed(0)
    made = get_peft_model(model, lora(use_dora=dora))
    args = getattr(kind, "Arguments", Seq2SeqTrainingArguments)(str(folder / "out"), **SETTINGS)
    data = {"train_dataset": rows.select(range(24)), "template": template}
    trainer = kind(model=made, args=args, **data, **options)
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [x["loss"] for x in trainer.state.log_history if "loss" in x]


def test_one_level_is_the_trainer_of_ms_swift(tmp_path: Path) -> None:
    ends = []
    for kind in (Seq2SeqTrainer, bilevel(Seq2SeqTrainer)):
        trainer = run(tmp_path / kind.__name__, kind)
        ends.append({"values": values(trainer.model), "losses": losses(trainer)})
    assert not differences(*ends) and len(ends[0]["losses"]) == 4


@pytest.mark.parametrize("method", [BiDoRA(), RowWeights()])
def test_a_method_trains_over_ms_swift_and_leaves_a_plain_adapter(
    tmp_path: Path, method: Any
) -> None:
    dora = isinstance(method, BiDoRA)
    options = {"method": method, "row_losses": row_losses}  # the loss of ms-swift is its own
    trainer = run(tmp_path, bilevel(Seq2SeqTrainer), dora=dora, upper=8, **options)
    history = trainer.state.log_history
    assert sum("upper_loss" in x for x in history) == 1  # after four lower steps
    assert len(losses(trainer.retrainer)) == 4
    trainer.save_model()
    rows = torch.arange(8)[None]
    loaded = PeftModel.from_pretrained(language_model(), str(tmp_path / "out"))
    torch.testing.assert_close(loaded.eval()(rows).logits, trainer.model.eval()(rows).logits)
    assert not torch.equal(loaded(rows).logits, language_model()(rows).logits)
