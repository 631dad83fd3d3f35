"""Two levels on a language model: seconds and memory beside a stock trainer's.

Ten lower steps of weighted sources and an upper step are compared with eleven steps of
`transformers.Trainer`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.measure import rounds, table_of
from benchmarks.speed import llama
from benchmarks.speed.gpu.machine import Machine, attempted, opened
from benchmarks.speed.language import ALONE, ESTIMATORS, PLAIN, Meter, run

Row = dict[str, Any]


def levels(machine: Machine, model: Any = None) -> Iterator[Row]:
    """Seconds of each run with checkpointing, and the peak of its memory above the model's."""
    model, meters = model or machine.model(), dict[str, Meter]()

    def one(name: str) -> float:
        gc.collect()
        meters[name] = run(name, machine.shape, model, machine.sizes, machine.device)
        return meters[name].seconds

    results = {name: attempted(partial(one, name))[1] for name in (PLAIN, ALONE, *ESTIMATORS)}
    seconds = rounds(list(meters), one, machine.rounds, warmup=0)  # each has run once
    table = {row["run"]: row for row in table_of(seconds, PLAIN)}
    alone = meters.get(ALONE)
    for name, result in results.items():
        meter = meters.get(name)
        yield {
            **table.get(name, {"run": name, "s": None, f"÷ {PLAIN}": None}),
            "before, MB": meter and meter.before,
            "peak above, MB": meter and meter.peak,
            "peak ÷ lower alone": meter.peak / alone.peak
            if meter and alone and alone.peak
            else None,
            "result": result,
        }


def four_bits(machine: Machine) -> Iterator[Row]:
    """`levels` on a base of bitsandbytes in nf4."""
    # Accelerate compares the number of the device with the Trainer's.
    place = machine.device if machine.device == "cpu" else torch.cuda.current_device()
    with TemporaryDirectory() as folder:
        llama.base(machine.shape, device=machine.device).save_pretrained(folder)
        gc.collect()
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options: Row = {"dtype": torch.bfloat16, "device_map": {"": place}}
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)
    yield from levels(machine, opened(llama.adapted(base)))
