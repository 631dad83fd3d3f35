"""A resumed run reads the data in the order of the one before it, whatever chose the order."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from tests.support.class_weights import streamed
from tests.support.resume import require_same_end

# Five steps an epoch: every checkpoint but the last is within one.
SAMPLERS = {"without a seed of its own": {"accelerator_config": {"use_seedable_sampler": False}}}
if "group_by_length" in {field.name for field in fields(TrainingArguments)}:  # before 5.2
    SAMPLERS["by length"] = {"group_by_length": True}
else:
    SAMPLERS["by length"] = {"train_sampling_strategy": "group_by_length"}
    SAMPLERS["in the data's order"] = {"train_sampling_strategy": "sequential"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_draws_what_it_drew(tmp_path: Path, name: Any) -> None:
    settings = {"rows": 25, "max_steps": 13, **SAMPLERS[name]}
    require_same_end(tmp_path, (4,), (8,), (11,), **settings)


@pytest.mark.parametrize("stop", [5, 6, 8])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_stream_that_begins_again(tmp_path: Path, stop: Any, micro: Any) -> None:
    """Five batches long, of which two make a step or one."""
    settings = {"gradient_accumulation_steps": micro, "save_steps": 1}
    require_same_end(tmp_path, (stop,), make=streamed, **settings)
