"""One run of the study: train as its record says, and measure."""

from __future__ import annotations

import copy
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from benchmarks.study.plan import BILEVEL, LORA, Run
from benchmarks.study.tasks import Task, task
from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments
from hyperopt_peft.problems import BiDoRA, DoRA, LoRA

PRESET = "preset"
#: How often in a run the training loss is compared with the one to stop at.
LOOKS = 30


def measure(run: Run, *, test: bool) -> dict[str, Any]:
    """Train, and score on training rows, on held-out rows and, where asked for, on test rows."""
    sizes = {name: count for name, count in run.rows.items() if name != "held_out"}
    here = task(run.task, layers=run.model["layers"], **sizes)
    train, held_out = here.drawn(run.size, run.rows["held_out"], run.seed)
    torch.manual_seed(run.seed)
    model = adapted(run, here)
    begin = time.process_time()
    result = (bilevel if run.method in BILEVEL else plain)(run, here, model, train)
    result["seconds"] = round(time.process_time() - begin, 2)
    apart = here.logits(model, held_out)
    result["train"] = quality(here, *here.logits(model, train))
    result["held_out"] = quality(here, *apart)
    if test:
        logits, labels = here.logits(model, here.test)
        result["test"] = quality(here, logits, labels)
        result["scaled"] = quality(here, logits / temperature(*apart), labels)
    return result


def quality(here: Task, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Score, loss and calibration error."""
    return {
        "score": round(float(here.metric(labels, logits.argmax(-1))), 5),
        "loss": round(float(cross_entropy(logits, labels)), 5),
        "ece": round(calibration_error(logits, labels), 5),
    }


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The expected calibration error, Σ_b n_b/n·|accuracy_b − confidence_b| (Guo et al. 2017).

    Bins are of equal width in the confidence.

    Example:
        >>> calibration_error(torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log(), torch.tensor([0, 1]))
        0.1...
    """
    confidence, guess = logits.double().softmax(-1).max(-1)
    gap = (guess == labels).double() - confidence
    number = (confidence * bins).ceil().long()
    sums = torch.zeros(bins + 1, dtype=torch.double).index_add(0, number, gap)
    return float(sums.abs().sum() / len(labels))


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T of the lowest cross entropy of ``logits / T``, between 1/20 and 20.

    Example:
        >>> round(temperature(torch.tensor([[9.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])), 2)
        8.19
    """
    found = minimize_scalar(
        lambda x: float(cross_entropy(logits.double() / 10**x, labels)),
        bounds=(-1.3, 1.3),
        method="bounded",
    )
    return float(10**found.x)


def adapted(run: Run, here: Task) -> Any:
    """The model with a new adapter and head."""
    config = LoraConfig(
        r=run.model["rank"],
        lora_alpha=run.model["alpha"],
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        use_dora=run.method != LORA,
    )
    return get_peft_model(here.model(run.model["layers"]), config)


def arguments(run: Run, folder: str, steps: int) -> BilevelTrainingArguments:
    """AdamW, a tenth of warm-up, then a linear decay; in each of two phases."""
    options = {name: x for name, x in run.options.items() if name != PRESET}
    return BilevelTrainingArguments(
        output_dir=folder,
        max_steps=steps,
        learning_rate=run.rate,
        per_device_train_batch_size=run.model["batch_size"],
        warmup_steps=max(1, steps // 10),
        seed=run.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        **options,
    )


def bilevel(run: Run, here: Task, model: Any, rows: list[int]) -> dict[str, Any]:
    """A search and a retraining of equally many steps, which have the run's passes together."""
    data = {"train_dataset": here.dataset(rows), "data_collator": here.states}
    with tempfile.TemporaryDirectory() as folder:
        method = BiDoRA.published() if PRESET in run.options else BiDoRA()
        counted = BilevelTrainer(
            copy.deepcopy(model), arguments(run, folder, 1), method=method, **data
        )
        a_step = 1 + counted.passes_of_an_upper_step() / counted.args.lower_steps
        steps = max(1, round(run.passes / a_step))
        BilevelTrainer(model, arguments(run, folder, steps), method=method, **data).train()
    return {"passes": round(steps * a_step), "steps": 2 * steps}


def plain(run: Run, here: Task, model: Any, rows: list[int]) -> dict[str, Any]:
    """One training of all of the adapter, which ends early where the run says so."""
    until = [] if run.until is None else [Until(run, here, rows)]
    data = {"train_dataset": here.dataset(rows), "data_collator": here.states}
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(run, folder, run.passes)
        method = LoRA() if run.method == LORA else DoRA()
        trainer = BilevelTrainer(model, args, method=method, callbacks=until, **data)
        trainer.train()
    return {"passes": trainer.state.global_step, "steps": trainer.state.global_step}


class Until(TrainerCallback):
    """Ends a training at the training loss of the run's ``until``, of which it looks now and then.

    The loss is that of all training rows without dropout.
    """

    def __init__(self, run: Run, here: Task, rows: list[int]) -> None:
        self.run, self.here, self.rows = run, here, rows

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Look, and stop."""
        if state.global_step % max(1, self.run.passes // LOOKS) == 0:
            loss = cross_entropy(*self.here.logits(more["model"], self.rows))
            assert self.run.until is not None
            control.should_training_stop |= bool(loss <= self.run.until)
