"""BiDoRA on tweets, beside LoRA and DoRA: the scores, and how magnitudes and directions moved.

    python examples/bidora.py                                # MiniLM and tweets, no network
    python examples/bidora.py --hypergradient darts:xi=1.0   # another estimator, by its name

The adapters of three layers train on the same tweets with equal passes. BiDoRA takes one half of
them for its search and the other for its second phase. The accuracy on held-out tweets is drawn, to
see whether it has stopped rising. So are, for each layer's query weight W' with rows W'_j,

    ΔM = mean over j of |‖W'_j‖ − ‖W0_j‖|        ΔD = mean over j of 1 − cos(W'_j, W0_j)

against each other (Liu et al. 2024, arXiv:2402.09353 §3.2; Qin et al. 2024, arXiv:2410.09758). Then
PEFT alone loads the saved BiDoRA adapter.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when torch is imported: threads that spin while they wait take the core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from hyperopt_peft import BiDoRA, BilevelTrainer, BilevelTrainingArguments, Method
from hyperopt_peft.heads import compute_once
from hyperopt_peft.hypergradients import get_estimator
from hyperopt_peft.method import lora_layers, option
from hyperopt_peft.problems import DoRA, LoRA
from hyperopt_peft.utils.plots import lines
from peft import PeftModel, get_peft_model
from torch.nn.functional import cosine_similarity
from transformers import HfArgumentParser, set_seed

from text_data import TRAINING, adapter, base_model, quiet, split_tweets

METHODS: dict[str, Method] = {"LoRA": LoRA(), "DoRA": DoRA(), "BiDoRA": BiDoRA()}
LOWER_STEPS, EVALUATIONS = 4, 10
LAYERS = 3, 4, 5  # of 0 to 5; the layers below are computed once for each tweet


@dataclass
class Arguments:
    """The estimator, the amount of training, and the folder for results."""

    hypergradient: str = option("direct", help="estimator of BiDoRA's upper level, by its name")
    output_dir: str = option("outputs/bidora", help="where results are written")
    rows: int = option(300, help="training tweets")
    held_out: int = option(300, help="tweets for the curve")
    test_rows: int = option(1000, help="test tweets")
    passes: int = option(200, help="passes, forward and backward, over 16 rows per training")


def trainer_of(name: str, arguments: Arguments, parts: Any, collate: Any) -> BilevelTrainer:
    """The trainer of a method, with all of its passes."""
    set_seed(0)
    method, steps = METHODS[name], arguments.passes
    if name == "BiDoRA":  # a cycle of the search: lower steps, and the upper step's passes
        cost = get_estimator(arguments.hypergradient).cost() or 2
        steps = round(steps / 2 * LOWER_STEPS / (LOWER_STEPS - 1 + cost))
    args = BilevelTrainingArguments(
        str(Path(arguments.output_dir) / name),
        hypergradient=arguments.hypergradient,
        lower_steps=LOWER_STEPS,
        max_steps=steps,
        retrain_arguments={"max_steps": arguments.passes // 2},
        learning_rate=2e-3,
        upper_learning_rate=2e-2,
        per_device_upper_batch_size=16,
        eval_strategy="steps",
        eval_steps=max(1, arguments.passes // EVALUATIONS),
        disable_tqdm=False,
        **TRAINING,
    )
    trainer = BilevelTrainer(
        get_peft_model(base_model(), method.adapter(adapter(*LAYERS))),
        args,
        method=method,
        train_dataset=parts["train"],
        eval_dataset=parts["held out"],
        data_collator=collate,
        compute_metrics=lambda prediction: measured(prediction, trainer.model),
    )
    compute_once(trainer, dropout=False)
    return trainer


@torch.no_grad()
def measured(prediction: Any, model: Any) -> dict[str, Any]:
    """The accuracy, and the pair (ΔD, ΔM) of each layer's query weight."""
    numbers = {"accuracy": np.mean(prediction.predictions.argmax(1) == prediction.label_ids)}
    queries = [layer for name, layer in lora_layers(model) if name.endswith("query")]
    for number, layer in zip(LAYERS, queries):
        before = layer.get_base_layer().weight
        direction = before + layer.get_delta_weight("default")
        magnitude = direction.norm(dim=1)
        if "default" in layer.lora_magnitude_vector:  # W' = m ⊙ V/‖V‖
            magnitude = layer.lora_magnitude_vector["default"].weight
        pair = 1 - cosine_similarity(direction, before), (magnitude - before.norm(dim=1)).abs()
        numbers[f"layer {number + 1}"] = [x.mean().item() for x in pair]
    return numbers


def main() -> None:
    """Train, score, draw, save and load."""
    (arguments,) = HfArgumentParser((Arguments,)).parse_args_into_dataclasses()
    quiet()
    output = Path(arguments.output_dir)
    sizes = {"train": arguments.rows, "held out": arguments.held_out, "test": arguments.test_rows}
    parts, collate = split_tweets(sizes, seed=0, max_length=32)
    keys = [f"layer {number + 1}" for number in LAYERS]
    curves, moves, pairs, scores = {}, {}, [], {}
    print("accuracy: held-out tweets, third and last quarter of the passes; test tweets; passes")
    for name in METHODS:
        trainer = trainer_of(name, arguments, parts, collate)
        trainer.train()
        phases = [each for each in (trainer, trainer.retrainer) if each is not None]
        logs = [log for each in phases for log in each.state.log_history if "eval_accuracy" in log]
        passes, held_out = curves[name] = [
            np.array([log[key] for log in logs]) for key in ("passes", "eval_accuracy")
        ]
        scores[name] = phases[-1].evaluate(parts["test"])["eval_accuracy"]
        quarter = 4 * passes // (passes[-1] + 1)
        means = (held_out[quarter == k].mean() for k in (2, 3))
        print(f"{name:8}{next(means):.3f}  {next(means):.3f}  {scores[name]:.3f}  {passes[-1]:.0f}")
        points = {key: np.array([log[f"eval_{key}"] for log in logs]).T for key in keys}
        pairs.append(np.concatenate([*points.values()], axis=1))
        slope, r = np.polyfit(*pairs[-1], 1)[0], np.corrcoef(pairs[-1])[0, 1]
        moves[f"{name}, {len(logs)} evaluations: slope {slope:.1f}, correlation {r:.2f}"] = points
    axes: Any = {"xlabel": "passes, forward and backward", "ylabel": "accuracy"}
    lines({"accuracy on held-out tweets": curves}, output / "curves.png", **axes)
    right, top = 1.05 * np.concatenate(pairs, axis=1).max(axis=1)
    axes = {"xlabel": "ΔD, change of directions", "ylabel": "ΔM, change of magnitudes"}
    lines(moves, output / "weights.png", **axes, xlim=(0, right), ylim=(0, top))

    trainer.save_model(str(output / "adapter"))
    loaded = PeftModel.from_pretrained(base_model(), output / "adapter").eval()
    rows = collate(parts["test"].remove_columns("text").select(range(8)).to_list())
    with torch.no_grad():
        gap = (loaded(**rows).logits - trainer.model.eval()(**rows).logits).abs().max().item()
    print(f"the adapter in {output / 'adapter'}, loaded by PEFT alone: logits differ by {gap:.1g}")
    (output / "results.json").write_text(json.dumps({"scores": scores, "logits": gap}, indent=1))
    print("one seed is no comparison of methods: docs/is-my-method-better.md, docs/results.md")


if __name__ == "__main__":
    main()
