"""Baselines: LoRA, DoRA or another adapter, trained on all rows without an upper level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperopt_peft.adapters import set_norm_grad, use_fast_dora
from hyperopt_peft.trainer.method import Method


@dataclass
class LoRA(Method):
    """Any adapter as it is."""


@dataclass
class DoRA(Method):
    """DoRA with PEFT's gradient."""

    fast_dora: bool = True

    def adapter(self, config: Any) -> Any:
        """``config`` with magnitudes."""
        config.use_dora = True
        return config

    def prepare(self, model: Any) -> None:
        """Let DoRA layers run the fast forward pass, or PEFT's."""
        (use_fast_dora if self.fast_dora else set_norm_grad)(model, "detach")
