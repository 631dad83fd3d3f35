"""Everything that a GPU would show, in at most nine minutes and one command.

    python benchmarks/speed gpu                          # writes results/speed_gpu.json
    python benchmarks/speed gpu --device cpu --small     # the same program where there is no GPU

*Layer*: a DoRA layer of 4096². *Step*: BiDoRA's step by PEFT's DoRA step, on MiniLM. *Levels*: ten
lower steps of weighted sources and an upper one by eleven plain steps, and the peak of memory, on
an untrained Llama of 1B with checkpointing. *Equality*: the hypergradient of sources in bf16 with
checkpointing less that without. *Attribution*: scores by the time of the run. *Flash*: dot products
with FlashAttention less those with the default kernel, where it is installed. *4-bit*: the same
levels on a base of bitsandbytes. A part that fails has its error as its result, and one that has
too little time left is left out; the file is written after each part.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from benchmarks.measure import arguments, environment, show
from benchmarks.pages import RESULTS
from benchmarks.speed import llama
from benchmarks.speed.dora_layer import single_layer
from benchmarks.speed.language import DOTS, PLAIN, run_seconds
from benchmarks.speed.timing import UNIT, steps, timed
from hyperopt_peft import attribute, hypergradient
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.problems import TaskLevel

#: Seconds of all parts, and what a part must have left to begin.
LIMIT, RESERVE = 540.0, 60.0
Row = dict[str, Any]


class Machine:
    """Where and how large: the device, the shape, and rows and tokens of a batch."""

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = device, small
        self.shape = "tiny" if small else "1B"
        self.sizes = {"size": 2, "length": 8} if small else {"size": 8, "length": 512}

    def model(self, attention: str = "sdpa", checkpointing: bool = False) -> Any:
        """An adapted model, whose B is not zero, so that all gradients flow."""
        base = llama.base(self.shape, device=self.device, attention=attention)
        adapted = llama.adapted(base)
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
            adapted.enable_input_require_grads()
        generator = torch.Generator(self.device).manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.02, generator=generator)
        return adapted.train()

    def batch(self, seed: int) -> Row:
        """Tokens with labels."""
        rows = llama.rows(self.shape, self.sizes["size"], self.sizes["length"], seed)
        return {n: x.to(self.device) for n, x in llama.collated(rows.to_list()).items()}

    def slope(self, adapted: Any, estimator: str) -> torch.Tensor:
        """The hypergradient of source weights under autocast, ``(2,)``."""
        source = torch.arange(self.sizes["size"], device=self.device) % 2
        logits = torch.zeros(2, device=self.device, requires_grad=True)
        weights = lambda batch: 2 * logits.softmax(0)[batch["source"]]  # noqa: E731
        below = {**self.batch(0), "source": source}
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16):
            upper = TaskLevel(adapted, [logits])
            lower = WeightedRows(adapted, weights, tags=["source"])
            parts = hypergradient(
                upper, lower, estimator, upper_batch=self.batch(1), lower_batch=below
            )
        return parts[0].double()


def layer(machine: Machine) -> list[Row]:
    """A DoRA layer: ours, PEFT's and LoRA's."""
    width, tokens = (64, 32) if machine.small else (4096, 4096)
    return single_layer(width, tokens, 3, machine.device, torch.bfloat16)


def step(machine: Machine) -> list[Row]:
    """BiDoRA's steps by PEFT's DoRA step."""
    size, length, repeats = (4, 8, 1) if machine.small else (32, 64, 3)
    runs, lower = steps(size, length, machine.device)
    return timed(runs, repeats, machine.device, UNIT, lower)


def levels(machine: Machine, adapted: Any = None) -> list[Row]:
    """Ten lower steps and an upper one: seconds, and the peak of the card's memory."""
    adapted = adapted or machine.model()
    cuda, rows = machine.device != "cpu", []
    for name in (PLAIN, "direct", DOTS, "darts"):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = run_seconds(
            name, machine.shape, adapted, {**machine.sizes, "device": machine.device}
        )
        peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else None
        rows.append({"run": name, "s": seconds, "peak, MB": peak})
    return [{**row, f"÷ {PLAIN}": row["s"] / rows[0]["s"]} for row in rows]


def equality(machine: Machine) -> list[Row]:
    """The relative difference of a hypergradient with checkpointing to that without."""
    rows = []
    for estimator in (DOTS, "darts", "minres:steps=2,product=difference", "minres:steps=2"):
        one, other = (machine.slope(machine.model(checkpointing=c), estimator) for c in (0, 1))
        rows.append(
            {"estimator": estimator, "difference": float((one - other).norm() / one.norm())}
        )
    return rows


def attribution(machine: Machine) -> list[Row]:
    """The seconds of a run, and of the run with the scores of its rows."""
    size, length = machine.sizes["size"], machine.sizes["length"] // 4
    seconds = []
    for scored in (False, True):
        args = TrainingArguments(
            **llama.options(size, machine.device, max_steps=4, max_grad_norm=0.0, seed=0)
        )
        data = {
            "train_dataset": llama.rows(machine.shape, 4 * size, length),
            "eval_dataset": llama.rows(machine.shape, size, length, seed=1),
        }
        trainer = Trainer(machine.model(), args, data_collator=llama.collated, **data)
        begin = time.perf_counter()
        attribute(trainer, progress=False) if scored else trainer.train()
        seconds.append(time.perf_counter() - begin)
    return [{"run, s": seconds[0], "with scores, s": seconds[1], "÷": seconds[1] / seconds[0]}]


def flash(machine: Machine) -> list[Row]:
    """Dot products with FlashAttention less those with the default kernel."""
    if find_spec("flash_attn") is None:
        return [{"result": "flash_attn is not installed"}]
    one, other = (
        machine.slope(machine.model(kind), DOTS) for kind in ("sdpa", "flash_attention_2")
    )
    return [{"difference": float((one - other).norm() / one.norm())}]


def four_bits(machine: Machine) -> list[Row]:
    """`levels` on a base in 4 bits."""
    with tempfile.TemporaryDirectory() as folder:
        llama.base(machine.shape).save_pretrained(folder)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map={"": machine.device}
        )
    return levels(machine, llama.adapted(base))


PARTS: dict[str, Callable[[Machine], list[Row]]] = {
    "layer": layer,
    "step": step,
    "levels": levels,
    "equality": equality,
    "attribution": attribution,
    "flash": flash,
    "4-bit": four_bits,
}


def main() -> None:
    """Measure each part, and write JSON after each."""
    if "--device" not in sys.argv:
        sys.argv += ["--device", "cuda"]
    options = arguments("all parts on one GPU", small=False, parts=list(PARTS))
    begin, tables = time.perf_counter(), {}
    small = options.small or options.quick
    path: Path | None = options.json or (None if small else RESULTS / "speed_gpu.json")
    machine = Machine(options.device, small)
    for name in options.parts:
        if LIMIT - (time.perf_counter() - begin) < RESERVE:
            tables[name] = [{"result": "no time left"}]
            continue
        try:
            tables[name] = PARTS[name](machine)
        except Exception as error:  # the other parts still have results
            tables[name] = [{"error": f"{type(error).__name__}: {str(error)[:300]}"}]
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
        if path is not None:
            content = {"tables": tables, "seconds": time.perf_counter() - begin}
            path.write_text(json.dumps({**content, **environment(options.device)}, indent=1) + "\n")
    show(tables)
