"""Optimizers with states of 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hyperopt_peft import BilevelTrainer
from tests.support.networks import differences
from tests.support.trainers import COUNTS_RIGHT

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.skipif(not COUNTS_RIGHT, reason="the stock Trainer's loss is no mean over labels")
def test_embeddings_keep_states_of_32_bits_as_in_the_trainer(tmp_path: Path) -> None:
    """Bit for bit; bitsandbytes has states of 8 bits for tensors of 4096 numbers or more."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(200, (16, 8), generator=generator).tolist()
    table, ends = Dataset.from_dict({"input_ids": ids, "labels": ids}), []
    for kind in (BilevelTrainer, Trainer):  # what the parent registers stays in the process
        torch.manual_seed(0)
        sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 200, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**sizes))
        model.loss_type = "ForCausalLM"  # else the Trainer counts the first label of each row too
        args = BilevelTrainer.Arguments(
            str(tmp_path),
            optim="adamw_bnb_8bit",
            max_steps=3,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = kind(model=model, args=args, train_dataset=table)
        trainer.train()
        states = trainer.optimizer.state
        kinds = {name: states[p]["state1"].dtype for name, p in model.named_parameters()}
        ends.append({"values": dict(model.named_parameters()), "kinds": kinds})
    assert {torch.uint8, torch.float32} == set(kinds.values())
    assert kinds["transformer.wte.weight"] == torch.float32
    assert not differences(*ends)
