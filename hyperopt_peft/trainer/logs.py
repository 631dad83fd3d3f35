"""The logged numbers of a `BilevelTrainer`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.signal_to_noise import ADVICE, MIN_SAMPLES, SignalToNoise

logger = logging.getLogger(__name__)


class StepLog:
    """The numbers of the steps since the last log: to be averaged, and the last of others."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self._values: dict[str, list[Any]] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Add a step's numbers without None and infinity (‖implicit‖/‖direct‖ with direct = 0)."""
        for key, value in values.items():
            if value is not None and value != float("inf"):
                self._values.setdefault(key, []).append(value)

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """The means over steps and processes, and the last numbers; both are then cleared."""
        means = {key: sum(map(float, each)) / len(each) for key, each in self._values.items()}
        last = {key: float(value) for key, value in self.last.items() if value is not None}
        self._values, self.last = {}, {}
        return distributed.averages(means), last


class NoiseLog:
    """``upper_snr`` of the upper steps since the last log; warns once where it is below 1."""

    def __init__(self) -> None:
        self._warned = False

    def read(self, signal: SignalToNoise) -> dict[str, float]:
        """The entry of the log; none before two upper steps."""
        count, ratio = signal.count, signal.read()
        if ratio is None or ratio == math.inf:
            return {}
        if ratio < 1 and count >= MIN_SAMPLES and not self._warned:
            self._warned = True
            logger.warning(
                "upper_snr: %.2g over %d upper steps: the upper level follows noise, unless it is "
                "near its minimum; try %s",
                ratio,
                count,
                ADVICE,
            )
        return {"upper_snr": ratio}


def upper_gap(logs: Mapping[str, float], history: list[dict[str, float]]) -> dict[str, float]:
    """``eval_loss`` minus the last ``upper_loss`` of ``history``, where there are both."""
    losses = [record["upper_loss"] for record in history if "upper_loss" in record]
    if "eval_loss" not in logs or not losses:
        return {}
    return {"eval_upper_gap": logs["eval_loss"] - losses[-1]}
