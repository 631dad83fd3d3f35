"""A solver of benchopt's bilevel benchmark: gradient steps with an estimated hypergradient."""

from benchopt import BaseSolver, safe_import_context
from benchopt.stopping_criterion import SufficientProgressCriterion

with safe_import_context() as import_ctx:
    import torch
    from benchmark_utils import constants
    from benchmark_utils.torch_from_jax import to_jax, to_torch, torch_from_jax
    from jax.flatten_util import ravel_pytree
    from torch.utils.data import DataLoader

    from hyperopt_peft import Engine, Problem

    class Level(Problem):
        """A function of both variables, on batches that are named by their first sample."""

        def __init__(self, function, both, own, starts, step_size):
            data = DataLoader(starts, batch_size=None, shuffle=True)
            super().__init__([own], data=data, optimizer=torch.optim.SGD([own], lr=step_size))
            self.function, self.both = function, both

        def loss(self, start):
            return self.function(start, *self.both)


class Solver(BaseSolver):
    """SGD on both variables, with a hypergradient by one of hyperopt_peft's estimators."""

    name = "hyperopt_peft"
    requirements = ["pip::torch", "pip::hyperopt-peft"]
    stopping_criterion = SufficientProgressCriterion(
        patience=constants.PATIENCE, strategy="callback"
    )
    parameters = {
        "estimator": ["cg:steps=10", "neumann", "nystrom", "f2sa", "darts"],
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "n_inner_steps": [10],
        "batch_size": [512],
        "eval_freq": [16],
        "random_state": [1],
    }

    @staticmethod
    def get_next(stop_val):
        return stop_val + 1

    def set_objective(
        self,
        f_inner,
        f_outer,
        n_inner_samples,
        n_outer_samples,
        inner_var0,
        outer_var0,
        f_inner_fb=None,
        f_outer_fb=None,
    ):
        # The variables may be trees of arrays; each level has one flat tensor.
        (self.inner_var0, self.to_inner), (self.outer_var0, self.to_outer) = (
            ravel_pytree(var0) for var0 in (inner_var0, outer_var0)
        )
        self.inner = self.on_batches(f_inner, n_inner_samples)
        self.outer = self.on_batches(f_outer, n_outer_samples)

    def on_batches(self, function, n_samples):
        """The function in torch, and the first samples of its batches."""
        size = n_samples if self.batch_size == "full" else self.batch_size

        def flat(start, inner_var, outer_var):
            inner_var, outer_var = self.to_inner(inner_var), self.to_outer(outer_var)
            return function(inner_var, outer_var, start, batch_size=size)

        return torch_from_jax(flat), range(0, n_samples - size + 1, size)

    def warm_up(self):
        self.run_once(1)  # compiles the functions and their derivatives

    def run(self, callback):
        torch.manual_seed(self.random_state)
        both = [to_torch(var0).requires_grad_() for var0 in (self.inner_var0, self.outer_var0)]
        self.inner_var, self.outer_var = both
        (f_inner, inner_starts), (f_outer, outer_starts) = self.inner, self.outer
        outer_step_size = self.step_size / self.outer_ratio
        engine = Engine(
            Level(f_outer, both, self.outer_var, outer_starts, outer_step_size),
            Level(f_inner, both, self.inner_var, inner_starts, self.step_size),
            self.estimator,
            lower_steps=self.n_inner_steps,
            seed=self.random_state,
            progress=False,
        )
        while callback():
            engine.run(self.eval_freq)

    def get_result(self):
        return {
            "inner_var": self.to_inner(to_jax(self.inner_var)),
            "outer_var": self.to_outer(to_jax(self.outer_var)),
        }
