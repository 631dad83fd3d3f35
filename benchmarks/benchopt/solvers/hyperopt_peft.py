"""Any estimator of hyperopt_peft as a solver of benchopt's bilevel benchmark.

Copy this one file into the ``solvers`` folder of https://github.com/benchopt/benchmark_bilevel,
or run it on the problem beside it: ``benchopt run benchmarks/benchopt``. The benchmark's problems
are JAX functions ``f(inner_var, outer_var, start, batch_size)``; `JaxFunction` lets torch
differentiate them, as often as an estimator asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from benchopt import BaseSolver
from torch import Tensor
from torch.utils.data import DataLoader

from hyperopt_peft import Engine, Problem


class JaxFunction:
    """A compiled JAX function ``(start, *inputs) -> outputs`` that torch differentiates.

    ``start`` is a whole number, ``inputs`` and the tuple ``outputs`` are arrays.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]], inputs: int, outputs: int) -> None:
        self.function, self.inputs, self.outputs = jax.jit(function), inputs, outputs

    def __call__(self, start: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs as tensors."""
        result: tuple[Tensor, ...] = _Call.apply(self, start, *inputs)
        return result

    @cached_property
    def vjp(self) -> JaxFunction:
        """``(start, *inputs, *cotangents)`` to the inputs' cotangents; compiled once."""

        def pulled_back(start: Any, *args: Any) -> tuple[Any, ...]:
            inputs, cotangents = args[: self.inputs], args[self.inputs :]
            return jax.vjp(lambda *xs: self.function(start, *xs), *inputs)[1](cotangents)

        return JaxFunction(pulled_back, self.inputs + self.outputs, self.inputs)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: JaxFunction, start: int, *inputs: Tensor) -> Any:
        ctx.function, ctx.start = function, start
        ctx.save_for_backward(*inputs)
        outputs = function.function(start, *(jnp.asarray(x.detach().numpy()) for x in inputs))
        return tuple(torch.from_numpy(np.array(output)) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        pulled_back = ctx.function.vjp(ctx.start, *ctx.saved_tensors, *cotangents)
        return None, None, *pulled_back


class Level(Problem):
    """One of the benchmark's two functions; a batch is the index of its first sample (None: 0)."""

    def __init__(self, own: Tensor, both: tuple[Tensor, Tensor], f: Any, **level: Any) -> None:
        self.both = both
        self.function = JaxFunction(lambda start, w, u: (f(w, u, start),), 2, 1)
        super().__init__([own], **level)

    def loss(self, batch: Any) -> Tensor:
        """f(inner_var, outer_var) on the batch."""
        return self.function(int(batch or 0), *self.both)[0]


class Solver(BaseSolver):
    """SGD at both levels, the outer one along a hypergradient of hyperopt_peft."""

    name = "hyperopt_peft"
    install_cmd = "conda"
    requirements = ("pip::hyperopt-peft", "pip::jax")
    sampling_strategy = "callback"
    parameters = {  # noqa: RUF012 - benchopt reads them from the class
        "hypergradient": ("cg:steps=10", "darts:xi=lr", "neumann:terms=10", "warm"),
        "step_size": (0.1,),
        "outer_ratio": (1.0,),
        "n_inner_steps": (10,),
        "batch_size": (64,),
        "eval_freq": (16,),
        "random_state": (1,),
    }

    def set_objective(
        self,
        f_inner: Any,
        f_outer: Any,
        n_inner_samples: int,
        n_outer_samples: int,
        inner_var0: Any,
        outer_var0: Any,
        f_inner_fb: Any,
        f_outer_fb: Any,
    ) -> None:
        """The benchmark's problem: losses, numbers of samples, and where to start."""
        self.levels = (f_inner, n_inner_samples), (f_outer, n_outer_samples)
        self.start = inner_var0, outer_var0

    def run(self, callback: Any) -> None:
        """Train until ``callback`` says that it is enough, ``eval_freq`` outer steps at a time."""
        self.both = w, u = [torch.from_numpy(np.array(x)).requires_grad_() for x in self.start]
        rates = self.step_size, self.step_size / self.outer_ratio
        lower, upper = (
            self._level(own, (w, u), *level, rate)
            for own, level, rate in zip((w, u), self.levels, rates)
        )
        engine = Engine(
            upper, lower, self.hypergradient, lower_steps=self.n_inner_steps, progress=False
        )
        while callback():
            engine.run(self.eval_freq)

    def get_result(self) -> dict[str, Any]:
        """Both variables as arrays."""
        inner_var, outer_var = (x.detach().numpy().copy() for x in self.both)
        return {"inner_var": inner_var, "outer_var": outer_var}

    def _level(
        self, own: Tensor, both: tuple[Tensor, Tensor], f: Any, samples: int, rate: float
    ) -> Level:
        size = samples if self.batch_size == "full" else min(self.batch_size, samples)
        generator = torch.Generator().manual_seed(self.random_state)
        starts = range(0, samples - size + 1, size)
        data = DataLoader(starts, batch_size=None, shuffle=True, generator=generator)  # type: ignore[arg-type]
        return Level(
            own,
            both,
            lambda w, u, start: f(w, u, start, batch_size=size),
            data=data,
            optimizer=torch.optim.SGD([own], lr=rate),
        )
