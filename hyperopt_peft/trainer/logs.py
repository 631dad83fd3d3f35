"""The logged numbers of a `BilevelTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from hyperopt_peft.hypergradients.estimate import LARGE_RESIDUAL
from hyperopt_peft.utils import distributed

#: The numbers in a printed line, and those that ``args.details`` adds.
PRINTED = ("loss", "upper_loss", "implicit_ratio")
DETAILS = ("grad_norm", "upper_grad_norm", "learning_rate")
PRINTED_AT_END = ("train_loss", "train_runtime")
#: The name endings of an evaluation's timings, which are not printed.
TIMINGS = ("_runtime", "_per_second", "_time")


class StepLog:
    """The numbers of the steps since the last log: some are averaged, of others the last counts."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self._values: dict[str, list[Any]] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Add a step's numbers, except None and infinity (an ``implicit_ratio`` without direct)."""
        for key, value in values.items():
            if value is not None and value != float("inf"):
                self._values.setdefault(key, []).append(value)

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """The means over steps and processes, and the last numbers; then clear both."""
        means = {key: sum(map(float, each)) / len(each) for key, each in self._values.items()}
        last = {key: float(value) for key, value in self.last.items() if value is not None}
        self._values, self.last = {}, {}
        return distributed.averages(means), last


def add_numbers(trainer: Any, logs: dict[str, float]) -> None:
    """Add the numbers of the levels of ``trainer``, its passes and seconds to ``logs``."""
    if "loss" in logs:
        step = trainer.current_step
        means, last = step.log.read()
        logs |= {key: value for key, value in means.items() if key not in logs} | last
        if trainer.skipped:
            logs["skipped"] = trainer.skipped
        ratio = None if step.bilevel is None else step.bilevel.signal.read()
        if ratio is not None and ratio != float("inf"):
            logs["upper_snr"] = ratio
    losses = [x["upper_loss"] for x in trainer.state.log_history if "upper_loss" in x]
    if "eval_loss" in logs and losses and trainer.is_in_train and trainer.phase.reads_trainer:
        logs["eval_upper_gap"] = logs["eval_loss"] - losses[-1]
    if trainer.is_in_train or "train_runtime" in logs:
        spent = distributed.averages(trainer.passes.read())  # a process has rows of its own
        # A resumed run adds two parts, whose last digit may be another.
        logs |= {name: round(value, 9) for name, value in spent.items()}


def line_of(args: Any, state: Any, logs: Mapping[str, Any]) -> str:
    """A short line from ``logs``: "step 20/50  loss 0.8321  upper_loss 0.9".

    It has the residual of the estimator's solve if that is large.
    """
    details = DETAILS if args.details else ()
    names = [name for name in (*PRINTED, *details, *PRINTED_AT_END) if name in logs]
    if logs.get("residual", 0.0) > LARGE_RESIDUAL:
        names.append("residual")
    names += [name for name in logs if name.startswith("eval_") and not name.endswith(TIMINGS)]
    numbers = [
        f"{name} {logs[name]:.4g}" if isinstance(logs[name], float) else f"{name} {logs[name]}"
        for name in names
    ]
    steps = [f"step {state.global_step}/{state.max_steps}"] if state.max_steps else []
    return "  ".join([*steps, *numbers])


def add_to_card(trainer: Any) -> None:
    """Append the settings of ``trainer`` to its model card."""
    levels = {"levels": [level.name for level in trainer.levels]}
    settings = levels | trainer.args.bilevel_settings()
    lines = "".join(f"- {key}: {value}\n" for key, value in settings.items())
    with (Path(trainer.args.output_dir) / "README.md").open("a") as card:
        card.write(f"\n\n## Bilevel training\n\nTrained with hyperopt-peft.\n\n{lines}")


class ShortProgress(ProgressCallback):
    """A progress bar that writes each log as a short line above itself."""

    def on_log(self, args: Any, state: Any, control: object, logs: Any = None, **_: Any) -> None:
        """Write the line."""
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line_of(args, state, logs))


class ShortPrinter(PrinterCallback):
    """Prints each log as a short line."""

    def on_log(self, args: Any, state: Any, control: object, logs: Any = None, **_: Any) -> None:
        """Print the line."""
        if state.is_world_process_zero and logs:
            print(line_of(args, state, logs), flush=True)


def shorten(trainer: Any) -> None:
    """Let ``trainer`` print logs as short lines, or nothing if bar and logs are off.

    The user's own callbacks stay as they are.
    """
    for kind, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortPrinter)):
        if any(type(callback) is kind for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(kind)
            if kind is ProgressCallback or trainer.args.logging_strategy != "no":
                trainer.add_callback(short)
