"""Random quadratic bilevel programs in float64, whose hypergradient has a closed form.

    f(w, u) = ½ wᵀHw + wᵀ(Cu + c)
    F(w, u) = ½ wᵀPw + pᵀw + wᵀRu + ½ uᵀQu + qᵀu
    dF/du   = (Rᵀw + Qu + q) − Cᵀ H⁻¹ (Pw + p + Ru)

C is a rotation, so that the relative error of the implicit term is that of H⁻¹b.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyperopt_peft import Problem
from hyperopt_peft.hypergradients import Vector

Shape = tuple[int, ...]
W_SHAPES: tuple[Shape, ...] = ((3, 2), (), (1, 4), (1,))
U_SHAPES: tuple[Shape, ...] = ((), (2, 1, 3), (5,))
CONDITION = 10.0


class FunctionLevel(Problem):
    """A level whose loss is any function of the batch; ``lr`` is that of gradient descent."""

    def __init__(
        self, function: Any, owned: Iterable[Any], *, lr: float | None = None, **options: Any
    ) -> None:
        self.function = function
        if lr is not None:
            tensors = [x[1] if isinstance(x, tuple) else x for x in owned]
            options["optimizer"] = torch.optim.SGD(tensors, lr=lr)
        super().__init__(owned, **options)

    def loss(self, batch: Any) -> Tensor:
        return self.function(batch)


class Level(FunctionLevel):
    """A level whose loss is a function of all w and all u as flat vectors."""

    def __init__(
        self,
        objective: Callable[[Tensor, Tensor], Tensor],
        owned: Sequence[Tensor],
        w: Sequence[Tensor],
        u: Sequence[Tensor],
        lr: float = 0.05,
    ) -> None:
        self.objective = objective
        super().__init__(lambda _: objective(flat(w), flat(u)), owned, lr=lr)


class Once(torch.autograd.Function):
    """x ↦ x², with a first derivative only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


@dataclass
class Program:
    """The matrices of a program, and its leaves ``w`` and ``u``."""

    h: Tensor
    c_mixed: Tensor
    c: Tensor
    p_matrix: Tensor
    p: Tensor
    r: Tensor
    q_matrix: Tensor
    q: Tensor
    w: list[Tensor]
    u: list[Tensor]

    def f(self, w: Tensor, u: Tensor) -> Tensor:
        return w @ self.h @ w / 2 + w @ (self.c_mixed @ u + self.c)

    def upper_f(self, w: Tensor, u: Tensor) -> Tensor:
        of_u = u @ self.q_matrix @ u / 2 + self.q @ u
        return w @ self.p_matrix @ w / 2 + self.p @ w + w @ self.r @ u + of_u

    def levels(self, *, scale: float = 1.0, lr: float = 0.05) -> tuple[Level, Level]:
        """Upper and lower level; ``scale`` multiplies f."""
        upper = Level(self.upper_f, self.u, self.w, self.u)
        lower = Level(lambda w, u: scale * self.f(w, u), self.w, self.w, self.u, lr)
        return upper, lower

    @property
    @torch.no_grad()
    def b(self) -> Tensor:
        """∂F/∂w."""
        return self.p_matrix @ flat(self.w) + self.p + self.r @ flat(self.u)

    @property
    @torch.no_grad()
    def direct(self) -> Tensor:
        """∂F/∂u."""
        return self.r.T @ flat(self.w) + self.q_matrix @ flat(self.u) + self.q

    @torch.no_grad()
    def implicit(self, v: Tensor) -> Tensor:
        """−∂²f/∂u∂w v."""
        return -self.c_mixed.T @ v

    @property
    @torch.no_grad()
    def exact_implicit(self) -> Tensor:
        return self.implicit(torch.linalg.solve(self.h, self.b))


def flat(leaves: Sequence[Tensor] | Vector) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def relative_error(actual: Any, expected: Any) -> float:
    """‖actual − expected‖/‖expected‖ of two tensors, vectors or sequences of tensors."""
    x, y = (x if isinstance(x, Tensor) else flat(x) for x in (actual, expected))
    return float((x - y).norm() / y.norm())


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def taken(engine: Any, steps: int = 1) -> list[Tensor]:
    """The hypergradients of a run as flat vectors; the upper variables do not move."""
    result: list[Tensor] = []
    engine.upper.step = lambda gradient, norm: result.append(flat(gradient)) or norm
    engine.run(steps)
    return result


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def leaves(values: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Leaves of ``shapes`` that hold the entries of ``values``."""
    chunks = values.split([math.prod(shape) for shape in shapes])
    return [c.reshape(s).clone().requires_grad_() for c, s in zip(chunks, shapes, strict=True)]


def rotation(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]


def symmetric(eigenvalues: Tensor, generator: torch.Generator) -> Tensor:
    q = rotation(len(eigenvalues), generator)
    return (q * eigenvalues) @ q.T


def positive(n: int, generator: torch.Generator) -> Tensor:
    """A symmetric matrix with eigenvalues between 1 and `CONDITION`, both met."""
    exponents = torch.rand(n, dtype=torch.float64, generator=generator)
    exponents[0], exponents[-1] = 0.0, 1.0
    return symmetric(CONDITION**exponents, generator)


def program(
    seed: int, w_shapes: Sequence[Shape] = W_SHAPES, u_shapes: Sequence[Shape] = U_SHAPES
) -> Program:
    """A random program with w at the minimum of f; as many unknowns above as below."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(map(math.prod, w_shapes))
    assert n == sum(map(math.prod, u_shapes))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    h, mixed, c, u = positive(n, generator), rotation(n, generator), normal(n), normal(n)
    return Program(
        h=h,
        c_mixed=mixed,
        c=c,
        p_matrix=positive(n, generator),
        p=normal(n),
        r=normal(n, n),
        q_matrix=positive(n, generator),
        q=normal(n),
        w=leaves(torch.linalg.solve(h, -mixed @ u - c), w_shapes),
        u=leaves(u, u_shapes),
    )


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs of 2 to 12 unknowns in up to four leaves a level, scalars among them."""
    n = draw(st.integers(2, 12))
    return program(draw(st.integers(0, 10**6)), draw(_shapes(n)), draw(_shapes(n)))


@st.composite
def _shapes(draw: st.DrawFn, n: int) -> list[Shape]:
    cuts = draw(st.lists(st.integers(1, n - 1), max_size=3, unique=True).map(sorted))
    sizes = [end - begin for begin, end in zip([0, *cuts], [*cuts, n])]
    return [draw(st.sampled_from([(k,), (k, 1), (1, k), *([()] if k == 1 else [])])) for k in sizes]
