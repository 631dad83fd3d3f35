"""What a user sees of a release in which one private name of another package has moved.

    python -m tests.support.moved

prints, as JSON, for each name of `NAMES` the warnings, errors and files of three programs. Each
runs in a process that imports the package with the name replaced in its sources.
"""

import json
import multiprocessing
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import BertForSequenceClassification as BertForSequenceClassification  # loads it
from transformers.pytorch_utils import Conv1D as Conv1D

#: Private names, each after its package.
NAMES = [
    ("peft", "lora_variant"),
    ("peft", "_embed"),
    ("peft", "conv_fn"),
    ("peft", "_get_embed_scale"),
    ("peft", "_dora_cache"),
    ("peft", "ENABLE_DORA_CACHING"),
    ("accelerate", "_hf_hook"),
    ("transformers", "loss_is_scaled_for_ga"),
]
Seen = dict[str, Any]


class Renamed(MetaPathFinder):
    """Imports ``package`` with the word ``name`` replaced in every module."""

    def __init__(self, package: str, name: str) -> None:
        self.package, self.name = package, name

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and (spec.origin or "").endswith(".py"):
            source = Path(str(spec.origin)).read_text()
            if re.search(rf"\b{self.name}\b", source):
                new = re.sub(rf"\b{self.name}\b", f"{self.name}_moved", source)
                spec.loader = Loader(fullname, str(spec.origin), new)
        return spec


class Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, source: str) -> None:
        super().__init__(fullname, path)
        self.source = source

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def engine() -> None:
    from hyperopt_peft import Engine, Problem

    w, u = (torch.ones(2, requires_grad=True) for _ in range(2))

    class Lower(Problem):
        def loss(self, batch: Any) -> torch.Tensor:
            return (w - u).square().sum()

    class Upper(Problem):
        def loss(self, batch: Any) -> torch.Tensor:
            return w.square().sum()

    lower = Lower([w], optimizer=torch.optim.SGD([w], lr=0.1))
    upper = Upper([u], optimizer=torch.optim.SGD([u], lr=0.1))
    Engine(upper, lower, "cg", progress=False).run(steps=2)


def adapter() -> None:
    """The fast forward pass on three types of layers, or PEFT's own."""
    from hyperopt_peft.adapters import use_fast_dora
    from tests.support.adapted_models import layer_input, randomise, single

    for kind in ("linear", "embedding", "conv2d"):
        model, x = randomise(single(kind)), layer_input(kind)
        before = model(x)
        torch.testing.assert_close(use_fast_dora(model)(x), before)


def training() -> list[str]:
    """BiDoRA on numbered rows by the Trainer; the files of its checkpoint."""
    from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments
    from hyperopt_peft.problems import RowWeights
    from tests.support.trainers import QUIET, data, peft_model

    with tempfile.TemporaryDirectory() as folder:
        options = QUIET | {"save_strategy": "steps", "save_steps": 2, "retrain": "none"}
        args = BilevelTrainingArguments(folder, max_steps=4, learning_rate=1e-3, **options)
        rows = {"train_dataset": data(), "upper_dataset": data(rows=6, seed=1)}
        BilevelTrainer(peft_model(dora=False), args, method=RowWeights(), **rows).train()
        return sorted(path.name for path in Path(folder, "checkpoint-4").iterdir())


def seen(case: tuple[str, str]) -> Seen:
    """The programs' warnings, errors and files where ``name`` of ``package`` has moved."""
    sys.meta_path.insert(0, Renamed(*case))
    result: Seen = {"name": case[1]}
    programs: dict[str, Callable[[], Any]] = {
        "engine": engine,
        "adapter": adapter,
        "training": training,
    }
    for key, program in programs.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value, error = None, None
            try:
                value = program()
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
        ours = [str(each.message) for each in caught if "use_fast_dora" in str(each.message)]
        result[key] = {"value": value, "error": error, "warnings": ours}
    return result


def main() -> None:
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps({each["name"]: each for each in pool.imap(seen, NAMES)}))


if __name__ == "__main__":
    main()
