"""The event files of TensorBoard have the numbers of both levels that the Trainer's state has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.class_weights import pair


def test_events_have_both_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    run, _ = pair(tmp_path, report_to="tensorboard", max_steps=6, lower_steps=2, logging_steps=2)
    run.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = reader.EventAccumulator(str(file.parent))
    events.Reload()
    for name in ("loss", "upper_loss", "grad_norm", "upper_grad_norm", "learning_rate"):
        logged = [(x["step"], x[name]) for x in run.state.log_history if name in x]
        written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert len(logged) == 3
        assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
