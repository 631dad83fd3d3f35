"""`BilevelTrainer`: what it moves the variables by, and that what it inherits keeps its meaning."""

from __future__ import annotations

import ast
import inspect
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import has_length

import hyperopt_peft
from hyperopt_peft import BilevelTrainer
from hyperopt_peft.attribution.recorder import RecordedTrainer
from hyperopt_peft.problems import LayerScales
from tests.support.class_weights import Stream
from tests.support.methods import method_trainer
from tests.support.networks import differences
from tests.support.trainers import (
    COUNTS_RIGHT,
    QUIET,
    arguments,
    data,
    peft_model,
    trainer,
    values,
)


@pytest.mark.parametrize(
    ("rows", "micro_batches"), [(data(), 2), (Stream(0, data(rows=22)), 1)], ids=["rows", "stream"]
)
def test_one_level_alone_is_the_trainer_itself(
    tmp_path: Path, rows: Any, micro_batches: int
) -> None:
    """Same batches, masks, schedule, clipping and logs, bit by bit; a pass ends as an epoch."""
    settings = {"max_steps": 7, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"weight_decay": 0.1, "warmup_steps": 2}
    settings |= {"gradient_accumulation_steps": micro_batches}
    settings = {**QUIET, **settings, "logging_steps": 2, "seed": 3}
    args = TrainingArguments(str(tmp_path / "plain"), **settings)
    plain = Trainer(peft_model(), args, train_dataset=rows)
    # The model's loss takes no num_items_in_batch into account where every micro-batch is full.
    plain.model_accepts_loss_kwargs = False
    plain.train()
    options = {"train_dataset": rows}
    run = trainer(tmp_path / "ours", method="dora", fast_dora=False, options=options, **settings)
    run.train()
    ours, theirs = values(run.model), values(plain.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    keys = ["loss", "grad_norm", "learning_rate", "step"]
    keys += ["epoch"] if has_length(rows) else []  # of a stream the Trainer counts passes
    logs = [
        [[record.get(key) for key in keys] for record in t.state.log_history if "loss" in record]
        for t in (run, plain)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3


@pytest.mark.skipif(not COUNTS_RIGHT, reason="the stock Trainer's loss is no mean over labels")
def test_embeddings_keep_states_of_32_bits_as_in_the_trainer(tmp_path: Path) -> None:
    """Bit for bit; bitsandbytes has states of 8 bits for tensors of 4096 numbers or more."""
    pytest.importorskip("bitsandbytes")
    ids = torch.randint(200, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    table, ends = Dataset.from_dict({"input_ids": ids, "labels": ids}), []
    args = arguments(tmp_path, optim="adamw_bnb_8bit", max_steps=3)
    for kind in (BilevelTrainer, Trainer):  # what the parent registers stays in the process
        torch.manual_seed(0)
        sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 200, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**sizes))
        model.loss_type = "ForCausalLM"  # else the Trainer counts the first label of each row too
        run = kind(model=model, args=args, train_dataset=table)
        run.train()
        states = run.optimizer.state
        kinds = {name: states[p]["state1"].dtype for name, p in model.named_parameters()}
        ends.append({"values": dict(model.named_parameters()), "kinds": kinds})
    assert {torch.uint8, torch.float32} == set(kinds.values())
    assert kinds["transformer.wte.weight"] == torch.float32
    assert not differences(*ends)


PACKAGE = Path(hyperopt_peft.__file__).parent


@dataclass
class Names:
    """The names that a class defines or sets, those that it reads, and those without a value."""

    own: set[str]
    read: set[str]
    empty: set[str]

    @classmethod
    def of(cls, kind: type) -> Names:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        found = cls({*vars(kind)}, set(), set())
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and node.value is None:
                found.empty.add(ast.unparse(node.target))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                (found.own if isinstance(node.ctx, ast.Store) else found.read).add(node.attr)
        return found


def test_no_base_class_reads_a_name_that_only_a_subclass_sets() -> None:
    kinds = [x for x in reversed(RecordedTrainer.__mro__) if x.__module__.startswith("hyperopt")]
    names, above = [Names.of(kind) for kind in kinds], set[str]()
    assert [kind.__name__ for kind in kinds][:2] == ["CombinedTrainer", "BilevelTrainer"]
    for number, each in enumerate(names[:-1]):
        above |= each.own
        below = set[str]().union(*(x.own for x in names[number + 1 :]))
        assert not (each.read - above) & below
        assert not each.empty


def test_from_train_to_the_backward_pass_of_the_upper_loss_are_seven_files(tmp_path: Path) -> None:
    walks = []

    class Watched(LayerScales):
        def upper_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
            loss = task_loss(batch)
            loss.register_hook(lambda _: walks.append(traceback.extract_stack()))
            return loss

    method_trainer(tmp_path, method=Watched(), max_steps=2, retrain="none").train()
    files = {Path(frame.filename) for frame in walks[0]}
    ours = sorted(str(x.relative_to(PACKAGE)) for x in files if x.is_relative_to(PACKAGE))
    assert "trainer/trainer.py" in ours and "hypergradients/oracle.py" in ours
    assert len(ours) <= 7, ours
