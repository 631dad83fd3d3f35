"""A run of the Trainer again, in float64: its losses row by row, its steps by their formulas."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import one_hot

from tests.support.fuzz.trainer import (
    CLASSES,
    FEATURES,
    FIRST_UPPER,
    LIMITS,
    PULL,
    RATES,
    Numbers,
    Run,
    written,
)

MULTIPLIER = 100.0  # of the estimator "f2sa"
BETAS, EPSILON = (0.9, 0.999), 1e-2
DAMPING = 0.3
#: Batches of rows' numbers, each with a mask of its rows' features.
Batches = Mapping[tuple[int, ...], Tensor]


class Optimizer:
    """The steps of one level: the gradient ↦ the variables after it, differentiable."""

    def __init__(self, form: Run, decay: Tensor | float, limit: float) -> None:
        self.form, self.decay, self.limit = form, decay, limit
        self.state = 0, torch.zeros(()), torch.zeros(())

    def step(self, x: Tensor, gradient: Tensor, rate: float, *, keep: bool = True) -> Tensor:
        if self.limit:
            gradient = gradient * (self.limit / (gradient.norm() + 1e-6)).clamp(max=1)
        if self.form.optimizer == "sgd":
            return x - rate * (gradient + self.decay * x)
        (count, m, v), (a, b) = self.state, BETAS
        count, m, v = count + 1, a * m + (1 - a) * gradient, b * v + (1 - b) * gradient.square()
        if keep:
            self.state = count, m, v
        root = (v.where(v > 0, 1.0) / (1 - b**count)).sqrt() * (v > 0)  # its slope at 0 is 0
        change = (m / (1 - a**count)) / (root + EPSILON)
        return x - rate * self.decay * x - rate * change


class Reference:
    """The run of ``form``: ``w``, ``u``, the ``logs`` of its steps, and cg's largest residual."""

    def __init__(self, form: Run, numbers: Numbers) -> None:
        self.form, self.numbers = form, numbers
        self.rows = {row["number"]: row for row in (*numbers.lower, *numbers.upper)}
        self.features = {number: self.mean_of_tokens(number) for number in self.rows}
        self.w = torch.cat([numbers.weight.flatten(), numbers.bias])
        self.u = torch.zeros(form.count).double() if form.weighs_rows else numbers.u
        self.u = {"decay": self.u[:2], "scale": 1 + self.u / 5}.get(form.method, self.u)
        decayed = form.decay * (torch.arange(len(self.w)) < CLASSES * FEATURES)
        self.below = Optimizer(form, decayed, LIMITS[form.clipping][0])
        self.above = Optimizer(form, form.decay / 2, LIMITS[form.clipping][1])
        self.residual, self.solution, self.start = 0.0, None, self.u
        self.logs: list[dict[str, float]] = []

    def mean_of_tokens(self, number: int) -> Tensor:
        """The features of a row, as f or F reads it."""
        tokens = torch.tensor(self.rows[number]["tokens"])
        changes = self.form.writes == "batch" and number < FIRST_UPPER
        return self.numbers.embedding[written(tokens) if changes else tokens].mean(0)

    def labels(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor([self.rows[number]["labels"] for number in rows])

    def each(self, rows: Sequence[int], mask: Tensor, w: Tensor, u: Tensor) -> Tensor:
        method, smoothing = self.form.method, self.form.smoothing
        x = torch.stack([self.features[number] for number in rows]) * mask
        x = x * u if method == "scale" else x
        logits = x @ w[:-CLASSES].view(CLASSES, FEATURES).T + w[-CLASSES:]
        logits = logits + u if method == "offsets" and rows[0] < FIRST_UPPER else logits
        targets = (1 - smoothing) * one_hot(self.labels(rows), CLASSES).double()
        return -((targets + smoothing / CLASSES) * logits.log_softmax(1)).sum(1)

    def weights(self, rows: Sequence[int], u: Tensor) -> Tensor:
        """The weights of ``rows`` in the mean of a batch: the model's, times the method's."""
        form, weights = self.form, torch.ones(len(rows), dtype=torch.float64)
        if form.loss == "weighted" and not form.smoothing and form.method != "offsets":
            weights = self.numbers.class_weights[self.labels(rows)]
        weights = weights / weights.sum()
        if rows[0] >= FIRST_UPPER:
            return weights
        if form.method == "column":
            return weights * 2 * u[[self.rows[number]["source"] for number in rows]].sigmoid()
        learned = {"sigmoid": 2 * u.sigmoid(), "softmax": len(u) * u.softmax(0)}
        return weights * learned[form.method][list(rows)] if form.weighs_rows else weights

    def mean(self, batches: Batches, w: Tensor, u: Tensor) -> Tensor:
        """The mean over the rows of a step; of an f that is the method's own, over batches."""
        total, count = torch.zeros((), dtype=torch.float64), sum(map(len, batches))
        own = self.form.method in ("column", "offsets")
        for rows, mask in batches.items():
            share = 1 / len(batches) if own and rows[0] < FIRST_UPPER else len(rows) / count
            total = total + share * self.weights(rows, u) @ self.each(rows, mask, w, u)
        return total

    def f(self, batches: Batches, w: Tensor, u: Tensor) -> Tensor:
        squares = torch.stack([w[:-CLASSES].square().sum(), w[-CLASSES:].square().sum()]) / 2
        factor = u.exp() if self.form.method == "decay" else torch.ones(2).double()
        return self.mean(batches, w, u) + (not self.form.weighs_rows) * PULL * factor @ squares

    def upper(self, batches: Batches, w: Tensor, u: Tensor) -> Tensor:
        """F without the prior."""
        loss = self.mean(batches, w, u)
        return loss + u.square().sum() / 20 if self.form.method == "offsets" else loss

    def run(self, steps: Sequence[Batches]) -> None:
        for number, step in enumerate(steps):
            lower = {rows: mask for rows, mask in step.items() if rows[0] < FIRST_UPPER}
            upper = {rows: mask for rows, mask in step.items() if rows[0] >= FIRST_UPPER}
            share = 1 - number / len(steps) if self.form.schedule == "linear" else 1.0
            w, u = self.w.requires_grad_(), self.u.requires_grad_()
            loss = self.f(lower, w, u)
            (slope,) = torch.autograd.grad(loss, w)
            log = {"loss": loss, "lower_grad_norm": slope.norm()}
            self.u = u.detach()
            if upper:
                value = self.hypergradient(lower, upper, w, u, share * RATES[0])
                log |= {"upper_loss": self.upper(upper, w, u), "upper_grad_norm": value.norm()}
                self.u = self.above.step(self.u, value, share * RATES[1])
            self.w = self.below.step(w.detach(), slope, share * RATES[0])
            self.logs.append({name: float(value) for name, value in log.items()})

    def hypergradient(
        self, lower: Batches, upper: Batches, w: Tensor, u: Tensor, rate: float
    ) -> Tensor:
        """The estimator's formula at w and u; ``rate`` is the lower optimizer's."""
        name, _, options = self.form.estimator.partition(":")

        def above(w: Tensor, u: Tensor) -> Tensor:
            prior = (self.form.prior or 0.0) / 2 * (u - self.start).square().mean()
            return self.upper(upper, w, u) + prior

        d, b = torch.autograd.grad(above(w, u), (u, w), materialize_grads=True)
        if name == "direct":
            return d

        def slope(w: Tensor, u: Tensor) -> Tensor:
            return torch.autograd.grad(self.f(lower, w, u), w, create_graph=True)[0]

        if name in ("sama", "unrolled"):
            after = self.below.step(w.detach(), slope(w, u), rate, keep=False)
            return d + torch.autograd.grad(after, u, b)[0]
        if name == "f2sa":

            def penalised(y: Tensor, u: Tensor) -> Tensor:
                """F + λ(f(y) − f(w) − ⟨∂f/∂w(w), y − w⟩)."""
                gap = self.f(lower, y, u) - self.f(lower, w.detach(), u) - start @ (y - w.detach())
                return above(y, u) + MULTIPLIER * gap

            y, start = w.detach(), slope(w, u).detach()
            for _ in range(10):  # Newton's
                y = y.requires_grad_()
                of_y = jacobian(lambda y: penalised(y, u), y)
                y = (y - torch.linalg.solve(hessian(lambda y: penalised(y, u), y), of_y)).detach()
            return torch.autograd.grad(penalised(y, u), u)[0]
        mixed = jacobian(lambda u: slope(w, u), u).T  # (m, n)
        if name == "darts":
            return d - (rate if "xi=lr" in options else 1.0) * mixed @ b
        return d - mixed @ self.solved(name, options, jacobian(lambda w: slope(w, u), w), b)

    def solved(self, name: str, options: str, h: Tensor, b: Tensor) -> Tensor:
        """v ≈ (H + damping·I)⁻¹ b, by the solver's formula."""
        eye = torch.eye(len(b), dtype=torch.float64)
        damped = h + DAMPING * eye
        if name == "neumann":
            return 0.2 * sum(torch.linalg.matrix_power(eye - 0.2 * h, k) @ b for k in range(6))
        if options.startswith("steps=1,"):
            q = h @ b + 0.01 * b
            v = b.dot(b) / b.dot(q) * b
            self.residual = max(self.residual, float((b - h @ v - 0.01 * v).norm() / b.norm()))
            return v
        if name != "warm":
            return torch.linalg.solve(damped, b)
        v, k = self.solution or (0.3 * b, 1)
        for _ in range(0 if self.solution else 20):
            v = v + 0.3 * (b - damped @ v)
        self.solution = v + 0.3 / k**0.5 * (b - damped @ v), k + 1
        return v
