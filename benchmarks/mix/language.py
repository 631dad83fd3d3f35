"""Does a learned mix of sources of text beat simple and online ways, for a language model?

    python benchmarks/mix language --data FOLDER

SmolLM2-135M, LoRA in its last layers (`instructions`), a few trusted rows of one task, and a clean
and a damaged source of each of three tasks. `language_ways` has the ways, whose trainings are the
product's; each takes at most as many passes as three trainings. Each way's settings are those of
the lowest loss on development rows: a learning rate, then one more setting. Test rows are read
once, by the seeds that are reported. An interrupted benchmark goes on from its file.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from benchmarks.measure import show
from benchmarks.mix.instructions import DATA, DEVELOPMENT_SEED, TASKS, Counts, Language
from benchmarks.mix.language_tables import BY_DOTS, tables_of
from benchmarks.mix.language_ways import VERDICT, WAYS, Setting, Sizes, Trial, verdict
from benchmarks.pages import RESULTS
from benchmarks.store import Row, Store, opened, run_parser

SEEDS, RATES = range(5), (2e-3, 6e-3)


class Benchmark:
    """The ways on one target: settings by development rows, then the seeds."""

    def __init__(self, runs: Store, language: Language, target: str, *, quick: bool) -> None:
        self.runs, self.language, self.target, self.quick = runs, language, target, quick
        self.drawn = cache(lambda seed: language.draw(target, seed))

    def trial(self, seed: int, setting: Setting) -> Trial:
        """The rows of ``seed``, and the model before training."""
        sizes = Sizes(steps=2, upper_steps=1, micro_batches=1) if self.quick else Sizes()
        return Trial(self.language, self.drawn(seed), seed, setting, sizes)

    def measure(self, row: Row, seed: int, setting: Setting) -> Row:
        """Train ``row``'s way, where the file lacks it."""
        if "loss" not in row:
            way, _ = WAYS[row["way"]]
            begin = time.process_time()
            row |= way(self.trial(seed, setting))
            row["seconds"] = round(time.process_time() - begin, 1)
            self.runs.save(row)
            named = {k: v for k, v in row.items() if k not in ("key", "part")}
            print(*named.values(), flush=True)
        return row

    def chosen(self, name: str) -> Setting:
        """The setting of the lowest loss on the development seed: its rate, then the other one."""
        if self.quick:
            return Setting()
        _, variants = WAYS[name]

        def loss(setting: Setting) -> float:
            key = {"part": "choice", "target": self.target, "way": name, "seed": DEVELOPMENT_SEED}
            row = self.runs.entry(**key, **asdict(setting))
            return float(self.measure(row, DEVELOPMENT_SEED, setting)["loss"])

        first, *others = (Setting(**variant) for variant in variants)
        best = min((replace(first, rate=rate) for rate in RATES), key=loss)
        return min([best, *(replace(other, rate=best.rate) for other in others)], key=loss)

    def compare(self, name: str, seed: int) -> Row:
        """A way on the rows of a seed."""
        setting = self.chosen(name)
        row = self.runs.entry(part="language", target=self.target, seed=seed, way=name)
        row["setting"] = asdict(setting)
        return self.measure(row, seed, setting)

    def judge(self, seed: int) -> None:
        """What `compare_baselines` recommends on the adapter."""
        row = self.runs.entry(part="verdict", target=self.target, seed=seed)
        if "named" not in row:
            setting = self.chosen(BY_DOTS)
            row |= {"setting": asdict(setting), **verdict(self.trial(seed, setting))}
            self.runs.save(row)
            print(self.target, seed, row["named"], flush=True)


def main() -> None:
    """Run what is missing in the file, and print the tables of all of it."""
    title = __doc__.partition("\n")[0]
    parser = run_parser(title, RESULTS / "mix_language.jsonl", TASKS)
    parser.set_defaults(parts=["e2e", "math"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, VERDICT], default=[*WAYS, VERDICT])
    parser.add_argument("--data", type=Path, default=DATA, help="the folder with instruct and e2e")
    options = parser.parse_args()
    runs = opened(options)
    few = Counts(file=40, clean=4, damaged=4, trusted=4, tests=4)
    language = Language(options.data, *(("small", few) if options.quick else ()))
    for target in options.parts:
        benchmark = Benchmark(runs, language, target, quick=options.quick)
        for seed in options.seeds[:1] if options.quick else options.seeds:
            for name in options.ways:
                if name == VERDICT:
                    benchmark.judge(seed)
                else:
                    benchmark.compare(name, seed)
    show(tables_of(runs))
    runs.finish()
