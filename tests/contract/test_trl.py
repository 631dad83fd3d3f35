"""Names of TRL that the package knows, in the releases that it is used with."""

import inspect
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import Trainer

from hyperopt_peft.trainer.internals import METRICS
from hyperopt_peft.trainer.phases import REFERENCE
from hyperopt_peft.trainer.upper_batches import PACKED
from tests.support.language import language_model, lora

trl = pytest.importorskip("trl")

from tests.support.over_trl import CONFIGS, made  # noqa: E402


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_of_a_trainer_only_offloads_besides(kind: type) -> None:
    """That is refused, so that the step may run around the lower level's passes."""
    if kind.training_step is Trainer.training_step:  # type: ignore[attr-defined]
        return
    lines = inspect.getsource(kind.training_step).splitlines()[1:]  # type: ignore[attr-defined]
    assert [line.strip() for line in lines if line.strip()] == [
        "with self.maybe_activation_offload_context:",
        "return super().training_step(*args, **kwargs)",
    ]


def test_metrics_packs_and_the_reference_have_their_names(tmp_path: Path) -> None:
    sft = made(tmp_path, trl.SFTTrainer, layout="packed")
    assert PACKED in sft.train_dataset.column_names
    assert {"_metrics", "_total_train_tokens"} <= vars(sft).keys() & set(METRICS)
    again = {"model": get_peft_model(language_model(), lora()), "peft_config": None}
    dpo = made(tmp_path, trl.DPOTrainer, options=again)
    assert set(dpo.model.peft_config) - {"default"} <= {REFERENCE}
