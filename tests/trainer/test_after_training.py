"""What a training leaves to other programs: a folder, a card, and numbers under known names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from tests.support.class_weights import Penalised, Weighted, streamed
from tests.support.documents import PAGES
from tests.support.trainers import base_model, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore::hyperopt_peft.errors.HypergradientWarning")
REFERENCE = PAGES["training-reference.md"]


def test_the_saved_configuration_has_the_keys_of_peft_s_own(tmp_path: Path) -> None:
    run = trainer(tmp_path / "ours", retrain="warm", max_steps=2)
    run.train()
    run.save_model()
    config = LoraConfig(task_type="SEQ_CLS", use_dora=True, target_modules=["query", "value"])
    get_peft_model(base_model(), config).save_pretrained(tmp_path / "stock")
    ours, stock = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("ours", "stock")
    )
    assert ours.keys() == stock.keys()
    assert (ours["peft_type"], ours["use_dora"]) == ("LORA", True)


def test_what_is_pushed_has_the_adapter_and_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the page says, with the checkpoints of the second phase."""
    pushed: dict[str, str] = {}

    def upload(*_: Any, folder_path: str, ignore_patterns: list[str], **__: Any) -> None:
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        named = {str(path.relative_to(folder_path)): path for path in files}
        for name in filter_repo_objects(named, ignore_patterns=ignore_patterns):
            pushed[name] = named[name].read_text(errors="replace")

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload, raising=False)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run = trainer(tmp_path, retrain="warm", hypergradient="cg:steps=2,damping=1.0", **saving)
    run.train()
    run.push_to_hub()
    files = {"adapter_model.safetensors", "adapter_config.json", "bilevel_settings.json"}
    assert files <= pushed.keys()
    _, _, section = pushed["README.md"].partition("## Bilevel training")
    assert "- levels: ['Direction', 'Magnitude']" in section
    assert "- hypergradient: cg:steps=2,damping=1.0" in section and "- lower_steps: 2" in section
    assert json.loads(pushed["bilevel_settings.json"]) == run.args.bilevel_settings()
    folders = {name.partition("/")[0] for name in pushed if "checkpoint" in name}
    assert folders == {"retrain"}


class Recorder(TrainerCallback):
    """The names of all that reporters such as W&B see."""

    names: set[str]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.names |= {*logs}


class Pulled(Weighted):
    """With a prior; its second loss is NaN."""

    calls = 0

    def __init__(self, model: Any, weight: Any) -> None:
        super().__init__(model, weight, prior=1.0)

    def loss(self, batch: Any) -> Any:
        self.calls += 1
        return super().loss(batch) * (float("nan") if self.calls == 2 else 1.0)


def test_the_page_lists_what_is_logged(tmp_path: Path) -> None:
    """All names but those that the Trainer itself adds."""
    recorder = Recorder()
    recorder.names = set()
    settings = {"hypergradient": "cg:steps=2,damping=1.0", "gamma": 0.1, "upper_prior": 1.0}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 6, "max_steps": 12}
    options = {"eval_dataset": data(rows=8, seed=5), "callbacks": [recorder]}
    trainer(tmp_path / "bidora", options=options, **settings).train()
    settings = {"hypergradient": "direct", "non_finite": "skip"}
    levels = streamed(tmp_path / "own", lower=Pulled, upper=Penalised, **settings)
    levels.add_callback(recorder)
    levels.train()
    section = REFERENCE.partition("## What is logged")[2].partition("\n## ")[0]
    text, _, table = section.partition("| --- |")
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    listed = {*re.findall(r"`(\w+)`", " ".join([text, *cells]))}
    others = {"epoch", "total_flos", "train_loss", "eval_loss"}
    others |= {"upper_penalty", "lower_penalty", "lower_task_loss"}  # that the losses return
    timings = ("_runtime", "_per_second", "_time")
    assert {n for n in recorder.names - others if not n.endswith(timings)} == listed


def test_each_phase_is_a_run_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"report_to": "tensorboard", "retrain": "warm", "hypergradient": "direct"}
    trainer(tmp_path, **settings).train()
    points = {}
    for phase in ("", "retrain"):
        (folder,) = {path.parent for path in (tmp_path / phase / "runs").rglob("events.*")}
        events = EventAccumulator(str(folder))
        events.Reload()
        tags = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
        assert ("train/upper_loss" in tags) == (phase == "")
        points[phase] = [(point.step, point.value) for point in tags["train/passes"]]
    assert points[""][0][0] == points["retrain"][0][0] == 1
    assert points["retrain"][0][1] > points[""][-1][1]
