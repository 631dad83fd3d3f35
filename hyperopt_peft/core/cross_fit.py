"""Cross-fitting: K folds of the upper data, each held out from the variables that it judges.

    min over u   1/K Σ_k F_k(u, w_k*(u))     with   w_k*(u) = argmin over w_k   f_k(u, w_k)

F_k is the loss on fold k, and f_k the loss on everything else, the other folds included. This is
one bilevel program with the lower variables w = (w_1, …, w_K) and the losses f = Σ_k f_k and
F = 1/K Σ_k F_k. The Hessian of f is block-diagonal, so that dF/du is the mean of the K programs'
hypergradients. K-fold cross-validation as a bilevel program: Bennett et al. 2006,
doi:10.1109/IJCNN.2006.246935.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hyperopt_peft.core.chain import is_chain
from hyperopt_peft.core.data import DataStream
from hyperopt_peft.core.prior import prior_value
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.core.validation import shared_memory
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.distributed import means

#: A function of the number of a fold: the context in which the fold's losses are evaluated.
Within = Callable[[int], AbstractContextManager[Any]]


class PerFold(tuple[Any, ...]):
    """A batch of a joint level: one batch for each fold. All folds share any other batch.

    Example:
        >>> PerFold(["rows of fold 0", "rows of fold 1"])
        ('rows of fold 0', 'rows of fold 1')
    """


class Folds(Problem):
    """The levels of K folds as one level, with the loss scale·Σ_k L_k; made by `cross_fit`.

    Metrics are means over the folds. A first-order pass holds the graph of one fold at a time.

    Args:
        levels: the levels of the folds, in order.
        variables: the variables of the joint level, by name.
        scale: 1 for a sum, 1/K for a mean.
        within: the context of a fold's evaluations and backward passes.
        level: arguments of `Problem`: optimizer, scheduler, max_grad_norm, prior.

    Example:
        >>> from hyperopt_peft.problems.ridge import diabetes
        >>> uppers, lowers = zip(diabetes(), diabetes())
        >>> variables = [(f"w{k}", level.variables[0]) for k, level in enumerate(lowers)]
        >>> joint = Folds(lowers, variables, scale=1.0)
        >>> bool(joint.evaluate(None)[0] == 2 * lowers[0].evaluate(None)[0])
        True
    """

    def __init__(
        self,
        levels: Sequence[Problem],
        variables: Sequence[tuple[str, Tensor]],
        *,
        scale: float,
        within: Within = nullcontext,
        **level: Any,
    ) -> None:
        self.levels, self.scale, self.within = list(levels), scale, within
        super().__init__(variables, name=self.levels[0].name, **level)
        streams = [each.batches for each in self.levels]
        if any(stream is None for stream in streams) and any(streams):
            raise ProblemError(f"{self.name}: some folds have data and some none; give each data")
        self.batches = None if streams[0] is None else _Streams(self.name, streams)

    def optimizer_options(self) -> Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]:
        """The options of the first fold, which are those of all: u is shared."""
        options = self.levels[0].optimizer_options()
        return options if isinstance(options, Mapping) else [*options] * len(self.levels)

    def terms(self, batch: Any) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """scale·L_k and its metrics, fold by fold, each in the fold's context; then the prior."""
        for k, (level, part) in enumerate(self._pairs(batch)):
            with self.within(k):
                loss, metrics = level.evaluate(part)
                self.half = bool(self.half or level.half)
                yield loss * self.scale, metrics
        if self.prior is not None:
            prior = prior_value(self.prior, self.variables, self.name)
            yield prior, {"prior": float(prior.detach())}

    def evaluate(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The joint loss with the graphs of all folds, and the mean metrics."""
        losses, metrics = zip(*self.terms(batch), strict=True)
        return torch.stack(losses).sum(), means(metrics)

    def backward(
        self, batch: Any, variables: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float], tuple[Tensor | None, ...]]:
        """As `Problem.backward`, fold by fold."""
        losses, metrics = [], []
        total: list[Tensor | None] = [None] * len(variables)

        def add(gradient: Sequence[Tensor | None], scale: float) -> None:
            for index, slope in enumerate(gradient):
                if slope is not None:
                    known, share = total[index], slope * scale
                    total[index] = share if known is None else known.add_(share)

        for k, (level, part) in enumerate(self._pairs(batch)):
            with self.within(k):
                loss, values, gradient = level.backward(part, variables)
            self.half = bool(self.half or level.half)
            losses.append(loss * self.scale)
            metrics.append(values)
            add(gradient, self.scale)
        if self.prior is not None:
            none = {id(v) for v, slope in zip(variables, total, strict=True) if slope is None}
            pairs = zip(self.names, self.variables, strict=True)
            self.unread = frozenset(name for name, v in pairs if id(v) in none)
            prior = prior_value(self.prior, self.variables, self.name)
            losses.append(prior.detach())
            metrics.append({"prior": float(prior.detach())})
            add(torch.autograd.grad(prior, variables, allow_unused=True), 1.0)
        return torch.stack(losses).sum(), means(metrics), tuple(total)

    def _pairs(self, batch: Any) -> Iterator[tuple[Problem, Any]]:
        shared = not isinstance(batch, PerFold)
        return zip(self.levels, [batch] * len(self.levels) if shared else batch, strict=True)


class _Streams(DataStream):
    """The data of K folds: each batch has the next one of every fold."""

    def __init__(self, name: str, streams: Sequence[Any]) -> None:
        self.name, self.streams = name, list(streams)

    def peek(self) -> PerFold:
        return PerFold(stream.peek() for stream in self.streams)

    def next(self) -> PerFold:
        return PerFold(stream.next() for stream in self.streams)

    def state_dict(self) -> dict[str, Any]:
        return {str(k): stream.state_dict() for k, stream in enumerate(self.streams)}

    def check_state(self, state: Any) -> None:
        if not isinstance(state, Mapping) or len(state) != len(self.streams):
            raise ProblemError(
                f"{self.name}: the data's state must be of {len(self.streams)} folds; use a state "
                "of this level"
            )
        for k, stream in enumerate(self.streams):
            stream.check_state(state.get(str(k)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for k, stream in enumerate(self.streams):
            stream.load_state_dict(state[str(k)])


def cross_fit(
    uppers: Sequence[Problem], lowers: Sequence[Problem], *, within: Within = nullcontext
) -> tuple[Folds, Folds]:
    """The K programs (``uppers[k]``, ``lowers[k]``) over one u as the two levels of one program.

    Every driver and estimator takes the two levels. A lower variable is named ``fold0.weight``; the
    upper variables keep their names. A batch of either level is a `PerFold`.

    The levels are made as for K separate programs. The optimizer of ``lowers[0]`` takes over the
    parameter groups of the others, which must be of its class. One factor clips the gradients of
    all folds: the joint ``max_grad_norm`` is √K times that of ``lowers[0]``, the limit of a fold
    where the folds' gradients have equal norms. A schedule of the lower level is made for the joint
    optimizer and assigned: ``lower.scheduler = LambdaLR(lower.optimizer, …)``. Optimizer, schedule,
    clipping and prior of u are those of ``uppers[0]``; the prior moves to the joint level.

    With exact products the graphs of all folds are in memory at once, and are differentiated
    outside of ``within``. `penalty` and `f2sa` weigh F against f, where F_k has the weight 1/K.

    Args:
        uppers: the levels with losses F_k, which own the same tensors u.
        lowers: the levels with losses f_k, which own different tensors.
        within: the context in which the losses of fold k are evaluated and differentiated.

    Raises:
        ProblemError: fewer than two folds, or numbers of levels that differ; uppers that own
            different tensors; lowers that share one; a level with levels below; a lower level with
            a scheduler or a prior; or optimizers of different classes.

    Example:
        >>> from hyperopt_peft import Engine
        >>> x, y = torch.arange(6.0) / 6, torch.arange(6.0) / 3
        >>> penalty = torch.zeros((), requires_grad=True)
        >>> class Line(Problem):
        ...     def __init__(self, w, rows, own, **level):
        ...         self.w, self.rows = w, rows
        ...         super().__init__([own], optimizer=torch.optim.SGD([own], lr=0.1))
        ...     def loss(self, batch):
        ...         return (self.w * x[self.rows] - y[self.rows]).square().mean()
        >>> class Ridge(Line):
        ...     def loss(self, batch):
        ...         return super().loss(batch) + penalty.exp() * self.w.square()
        >>> def levels(k, of_row=torch.tensor(split_folds(6, 3))):
        ...     w = torch.zeros((), requires_grad=True)
        ...     return Line(w, of_row == k, penalty), Ridge(w, of_row != k, w)
        >>> upper, lower = cross_fit(*zip(*map(levels, range(3))))
        >>> lower.names
        ('fold0.variable 0', 'fold1.variable 0', 'fold2.variable 0')
        >>> history = Engine(upper, lower, "cg", lower_steps=5, progress=False).run(20)
        >>> history[-1]["upper_loss"] < history[0]["upper_loss"]
        True
    """
    count = len(lowers)
    if count < 2 or len(uppers) != count:
        raise ProblemError(
            f"cross_fit: needs one upper and one lower level for each of two or more folds, got "
            f"{len(uppers)} and {count}"
        )
    for level in (*uppers, *lowers):
        if is_chain(level):
            raise ProblemError(f"{level.name}: a fold's level has levels below; cross-fit two")
    for level in lowers:
        if level.prior is not None:
            raise ProblemError(f"{level.name}: a fold's level has a prior; add it to the loss")
    above, prior = uppers[0], uppers[0].prior
    for k, level in enumerate(uppers):
        level.prior = None
        if [*map(id, level.variables)] != [*map(id, above.variables)]:
            raise ProblemError(
                f"{above.name}: the upper levels of fold 0 and fold {k} own different tensors; "
                "make all of them over the same tensors"
            )
    variables = [
        (f"fold{k}.{name}", variable)
        for k, level in enumerate(lowers)
        for name, variable in zip(level.names, level.variables, strict=True)
    ]
    if shared := shared_memory(variables):
        raise ProblemError(
            f"{lowers[0].name}: {shared[0]} is {shared[1]}, and each fold trains variables of its "
            "own; freeze the tensor, or give each fold a copy"
        )
    limit = lowers[0].max_grad_norm
    lower = Folds(
        lowers,
        variables,
        scale=1.0,
        within=within,
        optimizer=_joint_optimizer(lowers),
        max_grad_norm=None if limit is None else limit * count**0.5,
    )
    upper = Folds(
        uppers,
        list(zip(above.names, above.variables, strict=True)),
        scale=1 / count,
        within=within,
        optimizer=above.optimizer,
        scheduler=above.scheduler,
        max_grad_norm=above.max_grad_norm,
        prior=prior,
    )
    return upper, lower


def _joint_optimizer(levels: Sequence[Problem]) -> Optimizer | None:
    """The optimizer of the first level, with the groups and states of the others added."""
    joint, *others = [level.optimizer for level in levels]
    for level in levels:
        if type(level.optimizer) is not type(joint):
            raise ProblemError(
                f"{level.name}: the folds have optimizers of different classes; give each the same"
            )
        if level.scheduler is not None:
            raise ProblemError(
                f"{level.name}: the scheduler of one fold cannot drive the joint optimizer; leave "
                "it out, and set the joint level's scheduler"
            )
    for other in others:
        if joint is not None and other is not None:
            for group in other.param_groups:
                joint.add_param_group(group)
            joint.state.update(other.state)
    return joint


def split_folds(
    rows: int, folds: int, *, seed: int = 0, classes: Sequence[Any] | None = None
) -> list[int]:
    """The fold of each of ``rows`` rows, from 0 and below ``folds``; shuffled by ``seed``.

    Args:
        rows: the number of rows.
        folds: the number of folds K.
        seed: the seed of the permutation.
        classes: the class of each row, by which the folds are stratified, unless every class has
            fewer rows than K.

    Raises:
        ProblemError: K is not from 2 to ``rows``.

    Example:
        >>> folds = split_folds(6, 3, classes=["a", "b"] * 3)
        >>> sorted(folds[::2]), sorted(folds[1::2])
        ([0, 1, 2], [0, 1, 2])
    """
    if not 2 <= folds <= rows:
        raise ProblemError(
            f"folds: {folds} folds of {rows} rows are not possible; choose from 2 to {rows}"
        )
    from sklearn.model_selection import KFold, StratifiedKFold  # a second to import

    stratified = classes is not None and max(Counter(classes).values()) >= folds
    kind = StratifiedKFold if stratified else KFold
    found = [0] * rows
    with warnings.catch_warnings(action="ignore"):  # some class has fewer rows than K
        splits = kind(folds, shuffle=True, random_state=seed).split(found, classes)
        for k, (_, held_out) in enumerate(splits):
            for row in held_out.tolist():
                found[row] = k
    return found
