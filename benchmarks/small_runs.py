"""Small runs of both drivers, with dropout, that write checkpoints and can go on from them."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, TrainerCallback

from hyperopt_peft import Engine, Problem
from hyperopt_peft.engine.checkpoint import MANIFEST, last_valid, read_state, written
from hyperopt_peft.problems import BiDoRATrainer, BiDoRATrainingArguments

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
logging.getLogger("hyperopt_peft").setLevel(logging.ERROR)  # a killed run's checkpoint is skipped

# Every Trainer collects garbage; what was imported, a large part of its time, is none.
gc.freeze()

STATE = "engine.pt"
Final = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One way to train in a folder, from its last complete checkpoint or, without one, anew.

    ``train(folder, ready)`` calls ``ready`` before its first steps and returns all that should be
    the same however often it was killed: variables, optimizers, schedules, logs.
    """

    name: str
    driver: str
    settings: dict[str, Any] = field(default_factory=dict)

    def train(self, folder: Path, ready: Callable[[], object]) -> Final:
        """Train to the end."""
        function = engine_run if self.driver == "Engine" else trainer_run
        return function(folder, ready, **self.settings)

    def position(self, folder: Path) -> str | None:
        """Which checkpoint a run in ``folder`` would go on from."""
        if self.driver == "Engine":
            path = folder / STATE
            return f"upper step {read_state(path)['step']}" if path.exists() else None
        whole = last_checkpoint(folder)
        return None if whole is None else whole.relative_to(folder).as_posix()


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint of search or retraining."""
    found = [last_valid(phase) for phase in (folder, folder / "retrain")]
    return max(filter(None, found), key=written, default=None)


def being_written(folder: Path, since: float) -> bool:
    """Whether a checkpoint is not yet whole to which something was written after ``since``."""
    open_ones = [p for p in folder.glob("**/checkpoint-*") if not (p / MANIFEST).exists()]
    open_ones += folder.glob("*.part")
    try:
        return any(path.stat().st_mtime > since for path in open_ones)
    except FileNotFoundError:  # whole by now
        return False


def small_model() -> Any:
    """A BERT of two layers, DoRA of rank 2 with B not zero, dropout everywhere."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
        num_labels=3,
    )
    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        lora_alpha=4,
        lora_dropout=0.1,
        target_modules=["query", "value", "intermediate.dense"],
        use_dora=True,
    )
    model = get_peft_model(BertForSequenceClassification(config), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def small_data(rows: int, seed: int) -> Dataset:
    """Rows of 6 tokens in three classes."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 50, (rows, 6), generator=generator)
    features = {"input_ids": List(Value("int64")), "labels": ClassLabel(names=["a", "b", "c"])}
    columns = {"input_ids": tokens.tolist(), "labels": [row % 3 for row in range(rows)]}
    return Dataset.from_dict(columns, features=Features(features))


class Begin(TrainerCallback):  # type: ignore[misc]
    """Calls ``ready`` when a phase begins to train."""

    def __init__(self, ready: Callable[[], object]) -> None:
        self.ready = ready

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before the first step."""
        self.ready()


def small_trainer(
    folder: Path, callbacks: Sequence[TrainerCallback] = (), **settings: Any
) -> BiDoRATrainer:
    """A BiDoRA trainer that logs every step and saves every fourth."""
    common = {
        "max_steps": 22,
        "lower_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "upper_learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "retrain": "none",
        "gamma": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    args = BiDoRATrainingArguments(output_dir=str(folder), **{**common, **settings})
    data = {"train_dataset": small_data(36, 0), "eval_dataset": small_data(9, 1)}
    trainer = BiDoRATrainer(small_model(), args, callbacks=callbacks, **data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_run(folder: Path, ready: Callable[[], object], **settings: Any) -> Final:
    """`small_trainer` to its end; the logs without what measures time."""
    trainer = small_trainer(folder, [Begin(ready)], **settings)
    trainer.train(resume_from_checkpoint=last_valid(folder) is not None)
    last = trainer.retrainer or trainer
    search = last_valid(folder)
    assert search is not None
    state = json.loads((search / "trainer_state.json").read_text())
    return {
        "variables": {n: p.detach() for n, p in trainer.model.named_parameters()},
        "optimizer": last.optimizer.state_dict(),
        "schedule": last.lr_scheduler.state_dict(),
        "logs": without_times(last.state.log_history),
        "logs of the search": without_times(state["log_history"]),
    }


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A Trainer's log without seconds, rates and the mean loss since a run was resumed."""
    times = ("_runtime", "_per_second", "train_loss")
    return [{k: v for k, v in record.items() if not k.endswith(times)} for record in history]


class Classify(Problem):
    """Cross-entropy of a network on a batch."""

    def __init__(self, net: nn.Module, *args: Any, **options: Any) -> None:
        self.net = net
        super().__init__(*args, **options)

    def loss(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The loss, and the accuracy to log."""
        x, y = batch
        logits = self.net(x)
        accuracy = (logits.argmax(1) == y).double().mean()
        return {"loss": cross_entropy(logits, y), "accuracy": accuracy}


def small_engine(**options: Any) -> Engine:
    """Two layers with dropout; the upper level owns both biases, the lower one the weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3))
    named = dict(net.named_parameters())
    upper = {name: named.pop(name) for name in ("0.bias", "3.bias")}
    levels = []
    for owned, rows in ((upper, 14), (named, 18)):
        x, y = torch.randn(rows, 5), torch.randint(3, (rows,))
        optimizer = AdamW(owned.values(), lr=0.01)
        levels.append(
            Classify(
                net,
                owned.items(),
                data=DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
                optimizer=optimizer,
                scheduler=LinearLR(optimizer, 1.0, 0.1, total_iters=300),
            )
        )
    return Engine(*levels, lower_steps=2, warmup_steps=1, progress=False, **options)


def engine_run(
    folder: Path, ready: Callable[[], object], hypergradient: str, steps: int = 150
) -> Final:
    """`small_engine` to its end, saved every 10 upper steps."""
    transformers.set_seed(0)
    path = folder / STATE

    def save(engine: Engine, record: dict[str, Any]) -> None:
        if record["step"] % 10 == 0:
            engine.save(path)

    engine = small_engine(hypergradient=hypergradient, callbacks=[save])
    ready()
    if path.exists():
        engine.load(path)
    engine.run(steps - engine.step)
    return engine.state_dict()


RUNS = (
    Run("search, warm retraining", "Trainer", {"retrain": "warm"}),
    Run(
        "search, retraining from scratch, 2 micro-batches",
        "Trainer",
        {"retrain": "scratch", "gradient_accumulation_steps": 2, "max_steps": 14},
    ),
    Run(
        "search with cg, best model and 2 checkpoints kept",
        "Trainer",
        {
            "hypergradient": "cg:steps=2,damping=1.0",
            "eval_strategy": "steps",
            "eval_steps": 4,
            "load_best_model_at_end": True,
            "save_total_limit": 2,
        },
    ),
    Run("darts", "Engine", {"hypergradient": "darts:scheme=forward"}),
    Run("unrolled", "Engine", {"hypergradient": "unrolled:steps=2"}),
)
