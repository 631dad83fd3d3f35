"""The two levels of a form, whose variables are numbers of the form's seed.

With ``plain=True`` they are the same functions in float64 without what may hide a fault: no half
precision, compilation, checkpoint, transform, hook or custom function.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import logsigmoid, softplus
from torch.utils.checkpoint import checkpoint

from hyperopt_peft import Problem
from hyperopt_peft.core.examples import WeightedRows
from tests.support.fuzz.grammar import ROWS, WIDTH, Form
from tests.support.fuzz.network import Network

DTYPES = {"double": torch.float64, "single": torch.float32, "autocast": torch.float32}
DTYPES |= {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Levels:
    """Both levels of ``form`` at its point.

    Attributes:
        upper, lower: the levels as `Problem`.
        network: the module.
    """

    def __init__(self, form: Form, *, plain: bool, curvature: float = 0.0) -> None:
        self.form, self.plain, self.curvature = form, plain, curvature
        self.dtype = torch.float64 if plain else DTYPES[form.precision]
        self.numbers = np.random.RandomState(form.seed % 2**32)
        self.network = Network(form, plain=plain).to(self.dtype).train()
        self.x, self.y = self.tensor(2 * ROWS, WIDTH, size=1.0), self.tensor(2 * ROWS, size=1.0)
        self.y = (self.y > 0).to(self.dtype)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.copy_(self.tensor(*parameter.shape) + (parameter.dim() == 1) * 0.5)
        named = dict(self.network.named_parameters())
        above = [name for name in named if name.startswith("last.")]
        if form.extra == "frozen":
            named.popitem()[1].requires_grad_(False)
            above = above[:1]
        u = self._upper_variables({name: named[name] for name in above})
        w = {name: value for name, value in named.items() if not any(value is x for x in u)}
        w |= self._extra()
        if not plain:
            w, u = self._stored(w, u)
            self._meddle(w)
        self.w, self.u = tuple(w.values()), tuple(u)
        self.compiled: Any = None
        weighted = form.upper == "rows" and form.call == "module" and not plain
        kind = _WeightedRows if weighted else _Lower
        priors = {level: 0.3 if form.prior == level else None for level in ("upper", "lower")}
        self.problems = (
            None
            if plain
            else lambda optimizers: (
                _Upper(self, list(u), optimizer=optimizers[0], prior=priors["upper"]),
                kind(self, list(w.items()), optimizer=optimizers[1], prior=priors["lower"]),
            )
        )
        self.start = [x.detach().clone() for x in self.u]

    def tensor(self, *shape: int, size: float = 0.4) -> Tensor:
        """The next numbers, rounded so that every precision holds them."""
        values = torch.from_numpy(size * self.numbers.randn(*shape) if shape else np.array(0.3))
        narrow = self.form.precision in ("bfloat16", "float16")
        return values.to(torch.bfloat16 if narrow else torch.float32).to(self.dtype)

    def _upper_variables(self, layer: dict[str, Tensor]) -> list[Tensor]:
        shapes = {"decay": (len(list(self.network.parameters())),), "rows": (ROWS,)}
        shapes |= {"shift": (WIDTH,), "factor": (), "labels": (ROWS,)}
        if self.form.upper == "layer":
            return list(layer.values())
        return [self.tensor(*shapes[self.form.upper]).requires_grad_()]

    def _extra(self) -> dict[str, Tensor]:
        if self.form.extra == "empty":
            return {"empty": torch.zeros(0, dtype=self.dtype, requires_grad=True)}
        if self.form.extra == "scalar":
            return {"scalar": self.tensor().requires_grad_()}
        if self.form.extra == "complex":
            return {"complex": torch.tensor([0.3 + 0.2j], dtype=torch.complex128).requires_grad_()}
        if self.form.extra == "unread":
            return {"unread": self.tensor(2).requires_grad_()}
        return {}

    def _stored(
        self, w: dict[str, Tensor], u: list[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The variables in the form's memory; a parameter of the network is replaced there."""
        values = dict(w)
        if self.form.storage == "slices":
            flat = torch.cat([x.detach().flatten() for x in w.values()])
            pieces = flat.split([x.numel() for x in w.values()])
            values = {name: p.view(x.shape) for p, (name, x) in zip(pieces, w.items(), strict=True)}
        elif self.form.storage == "transposed":
            values = {
                n: x.detach().T.contiguous().T if x.dim() == 2 else x.detach() for n, x in w.items()
            }
        elif self.form.storage == "overlap" and self.form.upper != "layer":
            last, value = [pair for pair in w.items() if pair[1].numel()][-1]
            flat = torch.cat([u[0].detach().flatten(), value.detach().flatten()[1:]])
            n = u[0].numel()  # the last number of u is the first of w's last variable
            u = [flat[:n].view(u[0].shape).requires_grad_()]
            values[last] = flat[n - 1 :].view(value.shape)
        elif self.form.storage == "stride 0":
            last = next(name for name, x in w.items() if x.numel() > 1)
            values[last] = w[last].detach().flatten()[:1].expand(w[last].shape)
        replaced: dict[str, Tensor] = {}
        for name, value in values.items():
            if value is w[name]:
                replaced[name] = value
                continue
            replaced[name] = nn.Parameter(value)
            owners = [
                (module, key)
                for module in self.network.modules()
                for key, x in module._parameters.items()
                if x is w[name]
            ]
            for module, key in owners:
                module._parameters[key] = replaced[name]
            if not owners:
                replaced[name] = value.detach().requires_grad_()
        return replaced, u

    def _meddle(self, w: dict[str, Tensor]) -> None:
        first = next(iter(w.values()))
        if self.form.meddling == "scaled":
            first.register_hook(lambda slope: 2 * slope)
        elif self.form.meddling == "dropped":
            first.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", None))

    def record(self, level: str) -> None:
        """Called as the loss of ``level`` is evaluated."""

    def mask(self, rows: int) -> Tensor:
        """A mask of a sixth of the hidden numbers, from the form's generator."""
        if self.form.noise == "none":
            return torch.ones(rows, WIDTH, dtype=self.dtype)
        if self.form.noise == "torch":
            draws = torch.rand(rows, WIDTH)
        elif self.form.noise == "numpy":
            draws = torch.from_numpy(np.random.random_sample((rows, WIDTH)))
        else:
            draws = torch.tensor([[random.random() for _ in range(WIDTH)] for _ in range(rows)])
        return (draws > 1 / 6).to(self.dtype)

    def outputs(self, x: Tensor) -> Tensor:
        """The network's numbers ``(n,)`` of rows ``x``, by the form's kind of call."""
        mask, call = self.mask(len(x)), "module" if self.plain else self.form.call
        if call == "functional":
            return functional_call(self.network, dict(self.network.named_parameters()), (x, mask))
        if call == "vmap":
            parameters = dict(self.network.named_parameters())

            def one(row: Tensor, kept: Tensor) -> Tensor:
                return functional_call(self.network, parameters, (row[None], kept[None]))[0]

            return vmap(one)(x, mask)
        if call == "checkpoint":
            return checkpoint(self.network, x, mask, use_reentrant=False)
        if call == "compiled":
            if self.compiled is None:
                torch._dynamo.reset()
                self.compiled = torch.compile(self.network, backend="aot_eager")
            return self.compiled(x, mask)
        return self.network(x, mask)

    def row_losses(self, level: str) -> Tensor:
        """The loss of each row of a level's half of the data, ``(6,)``."""
        half = slice(0, ROWS) if level == "lower" else slice(ROWS, None)
        x, y, upper = self.x[half], self.y[half], self.form.upper
        if upper == "shift":
            x = x + self.u[0]
        if upper == "labels" and level == "lower":
            y = y + self.u[0]
        if self.form.precision == "autocast" and not self.plain:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = self.outputs(x)
            outputs = outputs.to(self.dtype)
        else:
            outputs = self.outputs(x)
        if upper == "factor":
            outputs = outputs * self.u[0]
        if self.form.task == "squares":
            return (outputs - y).square() / 2
        return y * softplus(-outputs) - (1 - y) * logsigmoid(-outputs)

    def terms(self, *, rows: Tensor) -> Tensor:
        """The lower loss of the ``rows``' losses."""
        if self.form.upper == "rows":
            rows = rows * self.u[0].sigmoid()
        total = rows.mean()
        for k, x in enumerate(self.w):
            if self.form.extra == "unread" and k + 1 == len(self.w):
                continue
            square = (x.real.square() + x.imag.square() if x.is_complex() else x.square()).sum()
            total = total + square * self.curvature / 2
            if self.form.upper == "decay" and k < len(self.u[0]):
                total = total + square * self.u[0][k].exp() / 20
            if x.is_complex():  # a coupling, so that the term is no mere decay
                total = total + (x.real * x.imag).sum() + 0.1 * self.last(x)
        return total

    def last(self, x: Tensor) -> Tensor:
        return (x.real.sum() * self.network.last.weight.sum()).tanh()

    def loss(self, level: str) -> Tensor:
        self.record(level)
        if not self.plain and level == "lower" and self.form.meddling in ("written", "data"):
            self._write()
        rows = self.row_losses(level)
        if level == "lower":
            return self.terms(rows=rows)
        return rows.mean() + sum(x.square().sum() for x in self.u) / 20

    def _write(self) -> None:
        if self.form.meddling == "data":
            self.w[0].data.clamp_(-0.3, 0.3)
        else:
            with torch.no_grad():
                self.w[0].clamp_(-0.3, 0.3)


class _Upper(Problem):
    def __init__(self, levels: Levels, variables: Any, **options: Any) -> None:
        self.of = levels
        super().__init__(variables, **options)

    def loss(self, batch: Any) -> Tensor:
        return self.of.loss("upper")


class _Lower(_Upper):
    def loss(self, batch: Any) -> Tensor:
        return self.of.loss("lower")


class _WeightedRows(WeightedRows):
    def __init__(self, levels: Levels, variables: Any, **options: Any) -> None:
        self.of = levels
        super().__init__(levels.network, lambda _: torch.ones(ROWS), variables, **options)

    def losses(self, batch: Any) -> Tensor:
        self.of.record("lower")
        if self.of.form.meddling in ("written", "data"):
            self.of._write()
        return self.of.row_losses("lower")

    def weighted(self, losses: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"loss": self.of.terms(rows=losses)}
