"""`upper_snr` is that of the hypergradients between two logs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hyperopt_peft.adapters import split_parameters
from tests.support.class_weights import pair
from tests.support.trainers import peft_model
from tests.support.watch import double, watched


def test_the_logged_ratio_is_of_the_window(tmp_path: Path) -> None:
    run, watch = watched(
        tmp_path, double(peft_model(dropout=0.0)), max_steps=12, lower_steps=2, logging_steps=6
    )
    run.train()
    names = list(split_parameters(run.model).magnitudes)
    slopes = torch.stack(
        [torch.cat([g[name].flatten() for name in names]) for g in watch.gradients[1::2]]
    )
    logs = [record for record in run.state.log_history if "upper_snr" in record]
    assert len(logs) == 2
    for record, window in zip(logs, slopes.split(3)):
        mean = window.mean(0)
        noise = float((window - mean).square().sum()) / 2
        signal = max(0.0, float(mean @ mean) - noise / 3)
        assert record["upper_snr"] == pytest.approx((signal / noise) ** 0.5, rel=1e-9)


@pytest.mark.parametrize(("rows_a_batch", "noisy"), [(1, True), (64, False)])
def test_the_ratio_is_below_one_in_noise(tmp_path: Path, rows_a_batch: int, noisy: bool) -> None:
    """Every log of single rows is noise; all rows are the same hypergradient again and again."""
    run, _ = pair(
        tmp_path,
        per_device_upper_batch_size=rows_a_batch,
        upper_learning_rate=0.0,
        per_device_train_batch_size=64,
        logging_steps=10,
        learning_rate=0.0,
    )
    run.train()
    ratios = [record["upper_snr"] for record in run.state.log_history if "upper_snr" in record]
    assert all((ratio < 1) == noisy for ratio in ratios)
