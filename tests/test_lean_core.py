"""A program with an Engine and two Problems loads PyTorch, and no library of the Trainer."""

import json

import pytest

from tests.support.process import python

TRAINERS = {"transformers", "datasets", "sklearn", "matplotlib", "peft", "accelerate", "pandas"}
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
Engine(upper, lower, "{estimator}", progress=False).run(steps=2)
"""
#: A script's own environment need not have the packages that this one requires.
REQUIRED = {"torchopt", "scipy", "joblib", "safetensors", "yaml", "pyarrow", "cloudpickle"}
BETTY = """
from hyperopt_peft import betty
from hyperopt_peft.betty import __main__
from tests.support.betty_programs import ridge

for kind in ("darts", "cg", "neumann", "sama"):
    ridge(betty, {"train_iters": 2, "roll_back": True}, {"type": kind}, {}).engine.run()
"""


def loaded(program: str) -> set[str]:
    """The modules of a process that has run ``program``."""
    last = "\nimport json, sys; print(json.dumps(list(sys.modules)))"
    return set(json.loads(python("-c", program + last).stdout.splitlines()[-1]))


def test_the_package_alone_loads_nothing() -> None:
    assert not loaded("import hyperopt_peft") & (TRAINERS | {"torch", "numpy"})


@pytest.mark.parametrize(
    ("program", "left_out"),
    [
        # Making an optimizer imports the shards: PyTorch's own, with its compiler.
        (
            "from hyperopt_peft import Engine, Problem",
            TRAINERS | {"torch.distributed.fsdp", "torchopt"},
        ),
        (ENGINE.format(estimator="cg"), TRAINERS | {"torchopt"}),
        (ENGINE.format(estimator="unrolled"), TRAINERS),
        ("from hyperopt_peft.problems.textbook import ridge", TRAINERS - {"sklearn", "pandas"}),
        (BETTY, TRAINERS | REQUIRED),
    ],
    ids=["import", "cg", "unrolled", "textbook", "betty"],
)
def test_pytorch_is_loaded_and_no_library_of_the_trainer(program: str, left_out: set[str]) -> None:
    modules = loaded(program)
    assert "torch" in modules and not modules & left_out
