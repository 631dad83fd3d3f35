"""Arguments of a training that writes no logs, reports or checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

#: Arguments that turn off evaluation, logs, reports and checkpoints.
QUIET = {
    "eval_on_start": False,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "logging_first_step": False,
    "logging_strategy": "no",
    "push_to_hub": False,
    "report_to": "none",
    "save_strategy": "no",
}


def quiet(args: Any, folder: str, kind: Any, **changes: Any) -> Any:
    """A copy of ``args`` for the same training without evaluation, logs, reports or checkpoints.

    The copy's class is ``kind``; arguments that ``kind`` lacks are dropped. A Trainer may create
    ``folder``, the ``output_dir``.
    """
    names = {each.name for each in fields(kind)}
    given = {x.name: getattr(args, x.name) for x in fields(args) if x.init and x.name in names}
    return kind(**{**given, **QUIET, "output_dir": folder, **changes})


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide progress bars of `datasets` and `transformers` in the body.

    Also hidden is the warning of Transformers each time PEFT reads `is_gradient_checkpointing`.
    """
    of_datasets, of_models = not are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing.", FutureWarning)
            yield
    finally:
        if of_datasets:
            enable_progress_bars()
        if of_models:
            logging.enable_progress_bar()
