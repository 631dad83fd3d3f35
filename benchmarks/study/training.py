"""One run of a study: train as its record says, and measure once."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from benchmarks.study.plan import Run
from benchmarks.study.tasks import Task, task
from benchmarks.study.variants import TRAINERS
from hyperopt_peft import BilevelTrainingArguments
from hyperopt_peft.adapters import decompose
from hyperopt_peft.problems import AdapterTrainer, BiDoRATrainingArguments, TwoPhaseTrainer

#: How often a training that may stop early is evaluated, and after how many of those it stops.
EVALUATIONS, PATIENCE = 10, 3


def measure(run: Run) -> dict[str, Any]:
    """Train, and score: on development rows in ``variants``, on held-out training rows in
    ``rates``, else on test rows."""
    here, rows = rows_of(run)
    torch.manual_seed(run.seed)
    model = adapted(run, here)
    first = adapted_weights(model)
    begin = time.process_time()
    result = (bilevel if "bilevel" in run.options else phases)(run, here, model, rows)
    result["seconds"] = round(time.process_time() - begin, 2)
    if run.options.get("method") == "full":
        result |= weight_line(first, adapted_weights(model))
    elif any("magnitude" in name for name, _ in model.named_parameters()):
        result |= line([(c.delta_direction, c.delta_magnitude) for c in decompose(model)])
    train = here.score(model, rows["union"]["row"])
    result |= here.score(model, rows["judged"]["row"])
    return result | {"train loss": train["loss"], "train score": train["score"]}


def rows_of(run: Run) -> tuple[Task, dict[str, Dataset]]:
    """The task, and rows: ``union`` of ``source`` and ``target`` or all to train on, ``judged``."""

    def task_of(name: str) -> Task:
        return task(name, layers=run.model["layers"], **run.rows)

    if run.part != "shift":
        here = task_of(run.task)
        drawn = here.drawn(run.size, run.seed)
        if run.part == "rates":
            count = run.size // 5
            judged, drawn = drawn[:count], drawn[count:]
        else:
            judged = (here.development if run.part == "variants" else here.test).tolist()
        return here, {"union": here.dataset(drawn), "judged": here.dataset(judged)}
    source, target = (task_of(f"{name} domain") for name in run.task.split(" → "))
    both, offset = joined(source, target), len(source.states.labels)
    below = both.dataset(source.drawn(run.options["source"], run.seed))
    above = both.dataset([offset + row for row in target.drawn(run.size, run.seed)])
    judged = both.dataset([offset + row for row in target.test.tolist()])
    union = concatenate_datasets([below, above])
    return both, {"source": below, "target": above, "union": union, "judged": judged}


def joined(source: Task, target: Task) -> Task:
    """One task of the rows of both, in this order."""
    one, other = source.states, target.states
    pairs = zip(vars(one).values(), vars(other).values())
    return replace(source, states=type(one)(*(torch.cat(pair) for pair in pairs)))


def adapted(run: Run, here: Task) -> Any:
    """The model with a new adapter and head; of ``full`` its last layers."""
    method = run.options.get("method", "bidora")
    config = LoraConfig(
        r=run.model["rank"],
        lora_alpha=run.model["scale"] * run.model["rank"],
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        use_dora=method != "lora",
    )
    base = here.model(run.model["layers"])
    return base if method == "full" else get_peft_model(base, config)


def options_of(run: Run, folder: str, steps: int, **more: Any) -> dict[str, Any]:
    """What all trainings share: AdamW, a tenth of warm-up, then a linear decay."""
    return {
        "output_dir": folder,
        "max_steps": max(1, steps),
        "learning_rate": run.rate,
        "per_device_train_batch_size": run.model["batch_size"],
        "per_device_eval_batch_size": 200,
        "warmup_steps": max(1, steps // 10),
        "seed": run.seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        **more,
    }


def bilevel(run: Run, here: Task, model: Any, rows: Mapping[str, Dataset]) -> dict[str, Any]:
    """A search and a retraining of as many steps as the run has passes."""
    settings = dict(run.options["bilevel"])
    kind = TRAINERS[settings.pop("trainer", "bidora")]
    if ratio := settings.pop("rate_ratio", None):
        settings["upper_learning_rate"] = ratio * run.rate
    with tempfile.TemporaryDirectory() as folder:

        def trainer(model: Any, steps: int) -> TwoPhaseTrainer:
            more = {"logging_strategy": "steps", "logging_steps": 0.25, "retrain_steps": steps}
            args = BiDoRATrainingArguments(**options_of(run, folder, steps, **more, **settings))
            data = {"train_dataset": rows["union"]}
            if "source" in rows:
                data = {"train_dataset": rows["source"], "upper_dataset": rows["target"]}
            return kind(model, args, data_collator=here.states, **data)

        again = 0 if settings.get("retrain") == "none" else 1
        counted = trainer(copy.deepcopy(model), 1)
        a_step = counted.passes_of_an_upper_step() / counted.args.lower_steps
        steps = max(1, round(run.passes / (a_step + again)))
        training = trainer(model, steps)
        training.train()
    noise = [row["upper_snr"] for row in training.state.log_history if "upper_snr" in row]
    return {"passes": round(steps * (a_step + again)), "steps": steps, "signal to noise": noise}


def phases(run: Run, here: Task, model: Any, rows: Mapping[str, Dataset]) -> dict[str, Any]:
    """Plain trainings, one after another."""
    taken, trainable = 0, [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for phase in run.options["phases"]:
        steps, data = round(run.passes * phase.get("share", 1.0)), rows[phase.get("rows", "union")]
        for name, parameter in trainable:
            part = "magnitudes" if "magnitude" in name else "directions"
            parameter.requires_grad_(phase.get("trains", part) == part)
        with tempfile.TemporaryDirectory() as folder:
            if phase.get("stop_early"):
                taken += stopped_early(run, here, model, data, folder, steps)
                continue
            plain(run, here, model, data, folder, steps).train()
            taken += steps
    return {"passes": taken}


def plain(run: Run, here: Task, model: Any, data: Dataset, folder: str, steps: int) -> Trainer:
    """The trainer of a control: of the adapter, or of all that learns."""
    method = run.options["method"]
    if method != "full" and all("trains" not in phase for phase in run.options["phases"]):
        args = BilevelTrainingArguments(**options_of(run, folder, steps))
        return AdapterTrainer(model, args, train_dataset=data, data_collator=here.states)
    args = TrainingArguments(**options_of(run, folder, steps))
    return Trainer(model, args, train_dataset=data, data_collator=here.states)


def stopped_early(run: Run, here: Task, model: Any, data: Dataset, folder: str, steps: int) -> int:
    """Train on four fifths, and keep the state of the lowest loss on the last; passes taken."""
    by = "label" if "label" in data.column_names else None
    parts = data.train_test_split(0.2, seed=run.seed, stratify_by_column=by)
    every = max(1, steps // EVALUATIONS)
    more = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**options_of(run, folder, steps, **more)),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=here.states,
        callbacks=[EarlyStoppingCallback(PATIENCE)],
    )
    trainer.train()
    return int(trainer.state.global_step)


def adapted_weights(model: Any) -> list[Tensor]:
    """Copies of the trained weights of query and value; none where there is an adapter."""
    named = model.named_parameters()
    of = ("query.weight", "value.weight")
    return [p.detach().clone() for n, p in named if p.requires_grad and n.endswith(of)]


def weight_line(before: list[Tensor], after: list[Tensor]) -> dict[str, Any]:
    """ΔM and ΔD of full fine-tuning, a layer a point."""
    points = []
    for old, new in zip(before, after, strict=True):
        turned = 1 - torch.cosine_similarity(old, new, dim=1).mean()
        longer = (new.norm(dim=1) - old.norm(dim=1)).abs().mean()
        points.append((float(turned), float(longer)))
    return line(points)


def line(points: list[tuple[float, float]]) -> dict[str, Any]:
    """ΔD and ΔM of each layer."""
    return {"changes": [[round(x, 8), round(y, 8)] for x, y in points]}
