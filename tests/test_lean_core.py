"""A program with an Engine and two Problems loads PyTorch, and no library of the Trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINERS = {"transformers", "datasets", "sklearn", "matplotlib", "peft", "accelerate", "pandas"}
SHARDS = {"torch.distributed.fsdp"}
ENGINE = """
import torch
from hyperopt_peft import Engine, Problem

class Lower(Problem):
    def loss(self, batch):
        return (self.variables[0] - u).square().sum()

class Upper(Problem):
    def loss(self, batch):
        return w.square().sum() + u.square().sum()

w, u = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
lower = Lower([w], optimizer=torch.optim.SGD([w], lr=0.1))
upper = Upper([u], optimizer=torch.optim.SGD([u], lr=0.1))
Engine(upper, lower, {estimator!r}, progress=False).run(steps=2)
"""


def loaded(program: str) -> set[str]:
    """The modules of a process that has run ``program``."""
    last = "\nimport json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program + last], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_alone_loads_nothing() -> None:
    assert not loaded("import hyperopt_peft") & (TRAINERS | {"torch", "numpy"})


def test_engine_and_problem_load_pytorch_and_no_shards() -> None:
    """Making an optimizer imports them: PyTorch's own, with its compiler."""
    modules = loaded("from hyperopt_peft import Engine, Problem")
    assert not modules & (TRAINERS | SHARDS | {"torchopt"})


@pytest.mark.parametrize(("estimator", "unrolls"), [("cg", False), ("unrolled", True)])
def test_a_program_with_an_engine_loads_no_trainer(estimator: str, unrolls: bool) -> None:
    modules = loaded(ENGINE.replace("{estimator!r}", repr(estimator)))
    assert not modules & TRAINERS
    assert ("torchopt" in modules) == unrolls


def test_a_program_of_the_library_loads_no_trainer() -> None:
    modules = loaded("from hyperopt_peft.problems.textbook import ridge")
    assert not modules & {"transformers", "datasets", "peft", "matplotlib"}
