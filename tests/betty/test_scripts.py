"""A script that was written for Betty runs as a program, and what is not supported is one line."""

from pathlib import Path
from textwrap import dedent

import pytest
import torch

from tests.support.process import python

SCRIPT = dedent("""
    import sys

    import torch
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem
    from rows import train, valid  # a module beside the script

    torch.set_default_dtype(torch.float64)
    file, kind = sys.argv[1:]


    class Vector(torch.nn.Module):
        def __init__(self, start):
            super().__init__()
            self.values = torch.nn.Parameter(torch.full((6,), start))

        def forward(self):
            return self.values


    class Hyper(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return {"loss": (x @ self.model() - y).square().mean(), "largest": self().max().item()}

        def grad_callback(self):
            torch.save(self.module.values.grad, file)


    class Model(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            penalty = (self.hyper().exp() * self.module() ** 2).sum() / 2
            return (x @ self.module() - y).square().mean() + penalty

        def configure_train_data_loader(self):
            return [train]

        def configure_module(self):
            return Vector(0.0)

        def configure_optimizer(self):
            return torch.optim.SGD(self.module.parameters(), lr=0.1)

        def configure_scheduler(self):
            return torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [1000])


    class Search(Engine):
        @torch.no_grad()
        def validation(self):
            assert not self.model.module.training
            x, y = valid
            return {"loss": (x @ self.model() - y).square().mean()}


    module = Vector(-1.0)
    hyper = Hyper(
        name="hyper",
        config=Config(log_step=1, retain_graph=True),
        module=module,
        optimizer=torch.optim.Adam(module.parameters(), lr=0.01),
        train_data_loader=[valid],
    )
    model = Model(
        name="model", config=Config(type=kind, cg_iterations=6, cg_alpha=0.1, unroll_steps=600)
    )
    search = Search(
        problems=[hyper, model],
        config=EngineConfig(train_iters=600, valid_step=300, logger_type="none"),
        dependencies={"l2u": {model: [hyper]}, "u2l": {hyper: [model]}},
    )
    if __name__ == "__main__":
        search.run()
    """)
ROWS = """
import torch

random = torch.Generator().manual_seed(0)
options = {"generator": random, "dtype": torch.float64}
train, valid = ((torch.randn(20, 6, **options), torch.randn(20, **options)) for _ in range(2))
"""


def closed_form(folder: Path) -> torch.Tensor:
    """dF/du at u = −1 by differentiating w*(u), the solution of the normal equations."""
    space: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    exec(ROWS, space)
    (x, y), (x_valid, y_valid) = space["train"], space["valid"]
    u = torch.full((6,), -1.0, dtype=torch.float64, requires_grad=True)
    w = torch.linalg.solve(2 * x.T @ x / 20 + torch.diag(u.exp()), 2 * x.T @ y / 20)
    (slope,) = torch.autograd.grad((x_valid @ w - y_valid).square().mean(), u)
    return slope


def test_first_hypergradient_is_the_closed_form(tmp_path: Path) -> None:
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "rows.py").write_text(ROWS)
    file = tmp_path / "slope.pt"
    done = python("-m", "hyperopt_peft.betty", "program/script.py", file, "cg", folder=tmp_path)
    expected = closed_form(folder)
    assert (torch.load(file) - expected).norm() < 1e-4 * expected.norm()
    assert [line.split(" loss")[0] for line in done.stdout.splitlines()] == [
        "[Validation] [Global Step 300]",
        "[Problem hyper] [Local Step 1] [Global Step 600]",
        "[Validation] [Global Step 600]",
    ]
    assert "largest: -1.0" in done.stdout


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("from betty.envs import Env", "betty.envs"),
        ("from betty.problems import HigherIterativeProblem", "HigherIterativeProblem"),
        ("from betty.configs import Config\nConfig(precision='fp16')", "bf16"),
        (None, "usage"),
    ],
)
def test_refused_in_one_line(program: str | None, words: str, tmp_path: Path) -> None:
    if program is not None:
        (tmp_path / "script.py").write_text(program)
    done = python("-m", "hyperopt_peft.betty", tmp_path / "script.py", fails=True)
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_errors_of_the_script_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import betty\nimport no_such_module_of_mine")
    done = python("-m", "hyperopt_peft.betty", tmp_path / "script.py", fails=True)
    assert "Traceback" in done.stderr
