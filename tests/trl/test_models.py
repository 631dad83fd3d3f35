"""Models that a trainer of TRL makes: by name, with a new adapter, over a 4-bit base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig

from hyperopt_peft import BiDoRA
from tests.support.language import language_model, tokenizer
from tests.support.networks import differences
from tests.support.process import python

trl = pytest.importorskip("trl")

from tests.support.over_trl import made  # noqa: E402

#: Reads the arguments of a run in a process that has made no class yet.
READ = """
import sys, torch
args = torch.load(sys.argv[1], weights_only=False)
print(type(args).__name__, args.upper_learning_rate, args.max_length, args.learning_rate)
"""


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    language_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def bidora(folder: Path, **options: Any) -> Any:
    settings = options.pop("settings", {})
    return made(
        folder,
        trl.SFTTrainer,
        BiDoRA(),
        options=options,
        adapter={"use_dora": True},
        **{"lower_steps": 2, "hypergradient": "direct", "max_steps": 2, **settings},
    )


@pytest.mark.slow
def test_a_model_by_name_is_the_model(tmp_path: Path, named: str) -> None:
    """The parent loads it, with its tokenizer, and gives it the adapter."""
    ends = []
    for model in (named, None):
        options = {"model": model} | ({"processing_class": None} if model else {})
        trainer = bidora(tmp_path / str(bool(model)), **options)
        trainer.train()
        ends.append({name: p.detach() for name, p in trainer.model.named_parameters()})
        assert isinstance(trainer.model, PeftModel)
    assert not differences(*ends)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:use_fast_dora:UserWarning")  # W0 cannot be read
@pytest.mark.parametrize("estimator", ["direct", "darts"])
def test_a_4_bit_base_trains_in_both_phases(tmp_path: Path, named: str, estimator: str) -> None:
    pytest.importorskip("bitsandbytes")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = bidora(
        tmp_path,
        model=named,
        quantization_config=four_bits,
        settings={"hypergradient": estimator, "max_steps": 4},
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == ("lora_" in name), name
    assert trainer.retrainer.state.global_step == 4


@pytest.mark.slow
def test_arguments_are_read_in_a_new_process(tmp_path: Path) -> None:
    """``training_args.bin``, whose class is made when it is read."""
    trainer = bidora(tmp_path, settings={"retrain": "none", "save_strategy": "steps"})
    trainer.train()
    path = next(tmp_path.glob("checkpoint-*")) / "training_args.bin"
    done = python("-W", "ignore", "-c", READ, path)
    assert done.stdout.split() == ["BilevelSFTConfig", "0.001", "1024", "0.01"]
