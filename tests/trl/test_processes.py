"""Bilevel trainers over SFTTrainer in each of two processes are one with all of the rows."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperopt_peft import BiDoRA
from tests.support import two_processes
from tests.support.language import language_model, rows

trl = pytest.importorskip("trl")

from tests.support.over_trl import made  # noqa: E402

RUNS: dict[str, dict[str, Any]] = {
    "direct": {"layout": "completion"},
    "darts": {"layout": "messages", "gradient_accumulation_steps": 2, "optim": "sgd"},
}


def train(folder: Path, batch: int, estimator: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    options = dict(RUNS[estimator])
    layout = options.pop("layout")
    trainer = made(
        folder,
        trl.SFTTrainer,
        BiDoRA(),
        layout,
        adapter={"use_dora": True},
        options={
            # A difference divides the rounding of a Llama's norms, which are in float32.
            "model": language_model(torch.float64 if estimator == "direct" else torch.float32),
            "train_dataset": rows(layout, 16),
            "upper_dataset": rows(layout, 8, seed=1),
        },
        hypergradient=estimator,
        lower_steps=2,
        max_steps=4,
        bf16=False,
        per_device_train_batch_size=batch,
        **options,
    )
    trainer.train()
    logs = trainer.state.log_history + trainer.retrainer.state.log_history
    return logs, {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def work(folder: Path) -> dict[str, Any]:
    return {name: train(folder / name, 2, name) for name in RUNS}


CONFIGURATION = Path(__file__).parents[2] / "examples/accelerate/two_cpu_processes.yaml"
#: Of the machine, and of the padding of each half.
OTHER = ("runtime", "_per_second", "seconds", "total_flos")


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Losses, TRL's metrics, and every parameter, with norms in float32."""
    here = sys.modules[__name__]
    results = two_processes.run(here, tmp_path / "two", configuration=CONFIGURATION)
    for name in RUNS:
        logs, values = train(tmp_path / name, 4, name)
        for result in results:
            others, parameters = result[name]
            for key, value in values.items():
                assert (parameters[key] - value).norm() < 1e-4 * value.norm(), (name, key)
            for ours, theirs in zip(logs, others, strict=True):
                for key in [key for key in ours if not key.endswith(OTHER)]:
                    assert theirs[key] == pytest.approx(ours[key], rel=1e-2, abs=1e-5), (name, key)
