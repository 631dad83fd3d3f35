"""Two levels on a language model: seconds and memory beside a stock trainer's.

Ten lower steps of weighted sources and an upper step are compared with eleven steps of
`transformers.Trainer`, or of TRL's `SFTTrainer` on packed rows.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.measure import rounds, table_of
from benchmarks.speed import llama
from benchmarks.speed.gpu.machine import Machine, attempted, opened
from benchmarks.speed.language import (
    ALONE,
    DOTS,
    ESTIMATORS,
    LOWER,
    PLAIN,
    Peak,
    run_seconds,
    seconds_of,
)
from hyperopt_peft import bilevel
from hyperopt_peft.problems import Sources

Row = dict[str, Any]


def levels(machine: Machine, model: Any = None) -> Iterator[Row]:
    """Seconds of each run with checkpointing, and the peak of its memory above the model's."""
    model, peaks = model or machine.model(), dict[str, Peak]()
    sizes = {**machine.sizes, "device": machine.device}

    def one(name: str) -> float:
        gc.collect()
        peaks[name] = Peak(machine.device)
        return run_seconds(name, machine.shape, model, sizes, peaks[name])

    results = {name: attempted(partial(one, name))[1] for name in (PLAIN, ALONE, *ESTIMATORS)}
    working = [name for name, result in results.items() if result == "done"]
    seconds = rounds(working, one, machine.rounds, warmup=0)  # each has run once
    table = {row["run"]: row for row in table_of(seconds, PLAIN)}
    alone = peaks[ALONE].value if ALONE in table else None
    for name, result in results.items():
        row = table.get(name, {"run": name, "s": None, f"÷ {PLAIN}": None})
        peak = peaks[name] if name in table else None
        yield {
            **row,
            "before, MB": peak and peak.before,
            "peak above, MB": peak and peak.value,
            "peak ÷ lower alone": peak.value / alone if peak and alone else None,
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


def documents(machine: Machine, seed: int) -> Dataset:
    """Random tokens in rows of a quarter of the length up to all of it, for packs of 16 batches."""
    size, length = machine.sizes.values()
    generator = torch.Generator().manual_seed(seed)
    count, vocabulary = 16 * size, llama.SHAPES[machine.shape][-1]
    lengths = torch.randint(length // 4, length + 1, (count,), generator=generator).tolist()
    drawn = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": drawn})


def packing(machine: Machine) -> Iterator[Row]:
    """Rows packed by ``bfd`` without padding, with FlashAttention: dots beside TRL alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    size, length = machine.sizes.values()
    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1, "<unk>": 2}, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    parts = [documents(machine, seed) for seed in range(3)]
    named = [part.add_column("source", [str(k)] * len(part)) for k, part in enumerate(parts[:2])]
    both, model, plain = bilevel(SFTTrainer), machine.model(machine.flash), f"SFT, {PLAIN}"
    options: Row = llama.options(size, machine.device, max_length=length, packing=True)
    options |= {"packing_strategy": "bfd", "gradient_checkpointing": True}

    def one(name: str) -> float:
        gc.collect()
        data: dict[str, Any] = {"processing_class": tokenizer}
        if name == plain:
            args = SFTConfig(**options, max_steps=LOWER + 1)
            rows = concatenate_datasets(parts[:2])
            return seconds_of(SFTTrainer(model, args, train_dataset=rows, **data))
        search: Row = {"hypergradient": name, "lower_steps": LOWER, "retrain": "none"}
        search |= {"max_steps": LOWER, "per_device_upper_batch_size": size}
        data |= {"train_dataset": concatenate_datasets(named), "upper_dataset": parts[2]}
        return seconds_of(
            both(model, both.Arguments(**options, **search), method=Sources(), **data)
        )

    yield from table_of(rounds((plain, DOTS), one, machine.rounds), plain)
