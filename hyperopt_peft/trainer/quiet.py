"""The arguments of a training that leaves no trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

#: Arguments with which a Trainer evaluates, logs, reports and saves nothing.
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


def quiet(args: Any, folder: str, kind: Any = None, **changes: Any) -> Any:
    """The arguments of the same training, which evaluates, logs, reports and saves nothing.

    The copy is of the class ``kind``, by default that of ``args``; arguments that it does not know
    are left out. A Trainer may make ``folder``, the ``output_dir``.
    """
    kind = kind or type(args)
    names = {each.name for each in fields(kind)}
    given = {each.name: getattr(args, each.name) for each in fields(args) if each.init}
    given = {name: value for name, value in given.items() if name in names}
    return kind(**{**given, **QUIET, "output_dir": folder, **changes})


@contextmanager
def no_bars() -> Iterator[None]:
    """No bars of `datasets` and `transformers` in the body, where every run would show its own.

    PEFT reads `is_gradient_checkpointing` of every model, of which Transformers warns each time.
    """
    libraries = (
        (are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars),
        (
            not logging.is_progress_bar_enabled(),
            logging.disable_progress_bar,
            logging.enable_progress_bar,
        ),
    )
    for _, disable, _ in libraries:
        disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing.", FutureWarning)
            yield
    finally:
        for disabled, _, enable in libraries:
            if not disabled:
                enable()
