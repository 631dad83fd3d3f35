"""Which estimator should BiDoRA have by default? Quality and seconds on development tasks alone.

CoLA's training file (``../shared/data/cola``) and movie sentences (vaderSentiment's source
distribution); no test row of any reported table is read. The adapter is in the last two layers of
MiniLM; what the four layers below give is computed once, so that a run takes seconds. Each run is
BiDoRA's search and warm retraining. One entry of the JSON file a run: an interrupted benchmark
goes on from it.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas
import torch
from datasets import ClassLabel, Dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import t as student
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from last_layers import LastLayers, States, encode, movies  # noqa: E402
from text_data import load_model, quiet  # noqa: E402

from hyperopt_peft.problems import BiDoRATrainer, BiDoRATrainingArguments  # noqa: E402

TRAIN, DEVELOPMENT = 300, 1000
SEEDS = range(5)
#: The methods of every seed; the others, a control and the same solves by differences, have one.
MAIN = ("direct", "darts xi from check", "minres:5", "warm")


def cola() -> pandas.DataFrame:
    """Sentences and their acceptability, from CoLA's training file."""
    path = ROOT.parent / "shared/data/cola/train.tsv"
    table = pandas.read_csv(path, sep="\t", names=["text", "label"], quoting=3)
    return table.drop_duplicates("text")


TASKS = {"cola": cola, "movies": movies}


@cache
def encoded(task: str) -> States:
    """All rows of a task that any seed draws."""
    table = TASKS[task]().sample(4000, random_state=0)
    return encode(list(table.text), torch.tensor(table.label.to_numpy()))


def run(task: str, seed: int, estimator: str, rate: float, steps: int) -> dict[str, Any]:
    """Development loss, accuracy and Matthews correlation after BiDoRA, and seconds of training."""
    data = encoded(task)
    order = torch.randperm(
        len(data.labels) - DEVELOPMENT, generator=torch.Generator().manual_seed(seed)
    )
    chosen = order[:TRAIN] + DEVELOPMENT  # the first rows are of development, for every seed
    columns = {"row": chosen.tolist(), "label": data.labels[chosen].tolist()}
    train = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["no", "yes"]))
    torch.manual_seed(seed)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        use_dora=True,
    )
    model = get_peft_model(LastLayers(load_model("minilm", ["no", "yes"])), config)
    with tempfile.TemporaryDirectory() as folder:
        args = BiDoRATrainingArguments(
            output_dir=folder,
            max_steps=steps,
            lower_steps=4,
            hypergradient=estimator,
            learning_rate=2e-3,
            upper_learning_rate=rate,
            per_device_train_batch_size=16,
            warmup_steps=steps // 10,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = BiDoRATrainer(model, args, train_dataset=train, data_collator=data)
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
    model.eval()
    with torch.no_grad():
        rows = data([{"row": row} for row in range(DEVELOPMENT)])
        logits = model(**rows).logits.double()
    guess = logits.argmax(1)
    return {
        "loss": float(cross_entropy(logits, rows["labels"])),
        "accuracy": float((guess == rows["labels"]).double().mean()),
        "matthews": _matthews(guess, rows["labels"]),
        "seconds": seconds,
    }


def _matthews(guess: torch.Tensor, labels: torch.Tensor) -> float:
    both = torch.stack([guess, labels]).double()
    value = float(torch.corrcoef(both)[0, 1])
    return 0.0 if math.isnan(value) else value


def paired(rows: Sequence[dict[str, Any]], method: str, base: str, key: str) -> dict[str, float]:
    """Mean difference ``method`` − ``base`` over tasks and seeds, with a 95 % interval."""
    by = {(r["task"], r["seed"], r["method"]): r[key] for r in rows}
    pairs = [(t, s) for t, s, m in by if m == method and (t, s, base) in by]
    differences = [by[t, s, method] - by[t, s, base] for t, s in pairs]
    mean, n = statistics.mean(differences), len(differences)
    half = math.nan
    if n > 1:
        half = student.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return {"mean": mean, "half": float(half), "n": n}


def against_direct(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The paired differences of each method to ``direct``, on the tasks and seeds of both."""
    known = {(r["task"], r["seed"]) for r in rows if r["method"] == "direct"}
    methods = {r["method"] for r in rows if (r["task"], r["seed"]) in known} - {"direct"}
    keys = ("loss", "accuracy", "seconds")
    return {m: {k: paired(rows, m, "direct", k) for k in keys} for m in sorted(methods)}


def main() -> None:
    """Run what is missing in the JSON file, and summarise all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="all runs; goes on from it")
    parser.add_argument(
        "--damping", type=float, default=2.0, help="about twice the most negative eigenvalue"
    )
    parser.add_argument(
        "--xi", type=float, default=0.15, help="least squares against a damped solve"
    )
    parser.add_argument("--upper_rate", type=float, default=2e-2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    rate, damping = given.upper_rate, f"damping={given.damping}"
    methods = {
        "upper rate 0": ("direct", 0.0),
        "direct": ("direct", rate),
        "darts xi=1": ("darts:scheme=forward,xi=1.0", rate),
        "darts xi from check": (f"darts:scheme=forward,xi={given.xi}", rate),
        "minres:5": (f"minres:steps=5,{damping}", rate),
        "minres:5 difference": (f"minres:steps=5,product=difference,{damping}", rate),
        "warm": (f"warm:{damping}", rate),
        "warm difference": (f"warm:product=difference,{damping}", rate),
    }
    rows = json.loads(given.json.read_text())["runs"] if given.json.exists() else []
    done = {(r["task"], r["seed"], r["method"]) for r in rows}
    for seed in [0] if given.quick else SEEDS:
        for task in TASKS:
            for method, (estimator, upper_rate) in methods.items():
                if (task, seed, method) in done or (seed > 0 and method not in MAIN):
                    continue
                result = run(task, seed, estimator, upper_rate, 8 if given.quick else given.steps)
                row = {"task": task, "seed": seed, "method": method, "estimator": estimator}
                rows.append({**row, **result})
                content = {"runs": rows, "against direct": against_direct(rows)}
                given.json.write_text(json.dumps(content, indent=1) + "\n")
                print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
