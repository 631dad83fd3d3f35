"""Random quadratic functions at both levels, a sample at a time, with a closed-form solution."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchopt import BaseDataset

jax.config.update("jax_enable_x64", True)


class Dataset(BaseDataset):
    """f(w, u) = mean over samples of ½wᵀAᵢw + ½uᵀBᵢu + uᵀCᵢw + dᵢᵀw, at either level."""

    name = "simulated"
    parameters = {  # noqa: RUF012 - benchopt reads them from the class
        "dim": (5,),
        "n_samples": (128,),
        "mu": (0.1,),
        "random_state": (0,),
    }

    def get_data(self) -> dict[str, Any]:
        """The two levels, and ``metrics`` by linear algebra."""
        rng = np.random.default_rng(self.random_state)
        inner, outer = (_coefficients(rng, self.n_samples, self.dim, self.mu) for _ in range(2))
        f_inner, f_outer = partial(_quadratic, inner), partial(_quadratic, outer)
        (a, _, c, d), (a_o, b_o, c_o, d_o) = (
            tuple(x.mean(0) for x in level) for level in (inner, outer)
        )

        def metrics(inner_var: Any, outer_var: Any) -> dict[str, float]:
            best = np.linalg.solve(a, -d - outer_var @ c)
            v = np.linalg.solve(a, a_o @ best + outer_var @ c_o + d_o)
            gradient = b_o @ outer_var + c_o @ best - c @ v
            return {
                "value": float(gradient @ gradient),
                "func": float(f_outer(best, outer_var, 0, self.n_samples)),
                "inner_distance": float(np.sum((best - inner_var) ** 2)),
            }

        problem = {
            "f_inner": f_inner,
            "f_outer": f_outer,
            "n_inner_samples": self.n_samples,
            "n_outer_samples": self.n_samples,
            "inner_var0": rng.standard_normal(self.dim),
            "outer_var0": rng.standard_normal(self.dim),
            "f_inner_fb": partial(f_inner, start=0, batch_size=self.n_samples),
            "f_outer_fb": partial(f_outer, start=0, batch_size=self.n_samples),
        }
        return {"problem": problem, "metrics": metrics}


def _coefficients(rng: np.random.Generator, n: int, dim: int, mu: float) -> tuple[np.ndarray, ...]:
    def positive() -> np.ndarray:
        root = rng.standard_normal((n, dim, dim))
        product = root @ root.transpose(0, 2, 1)
        return product / np.linalg.norm(product.mean(0), 2) + mu * np.eye(dim)

    cross, linear = rng.standard_normal((n, dim, dim)), rng.standard_normal((n, dim))
    return positive(), positive(), 0.1 * cross, linear


@partial(jax.jit, static_argnames="batch_size")
def _quadratic(
    coefficients: tuple[Any, ...],
    inner_var: Any,
    outer_var: Any,
    start: int = 0,
    batch_size: int = 1,
) -> Any:
    parts = (jax.lax.dynamic_slice_in_dim(x, start, batch_size) for x in coefficients)
    a, b, c, d = (part.mean(0) for part in parts)
    half = inner_var @ a @ inner_var / 2 + outer_var @ b @ outer_var / 2
    return half + outer_var @ c @ inner_var + jnp.dot(d, inner_var)
