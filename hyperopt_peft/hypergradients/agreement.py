"""Exact second-derivative products against differences of gradients.

A difference over h errs by kinks, rounding and truncation. So does one over 2h, by other amounts:
their difference is the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import DifferenceProduct
from hyperopt_peft.utils.reductions import squares, to_floats

CURVATURE = 1e-3  # a relative error above this is found
MARGIN = 10.0  # times the change from a difference over h to one over 2h

#: Advice for a wrong exact product.
WRONG_PRODUCT = (
    'choose product="difference"; look for weight_norm, or a custom autograd function whose '
    "backward pass is in no_grad() or reads .data"
)


def disagreement(
    names: Sequence[str],
    exact: Iterable[Tensor],
    near: Iterable[Tensor],
    far: Iterable[Tensor],
    floor: float | None = None,
) -> str:
    """The variable in which ``exact`` is not the difference ``near``, in words; else empty.

    ``near`` and ``far`` are differences over h and 2h. An error below ``floor`` is none; by default
    that is ‖near − far‖.
    """
    parts = zip(exact, near, far, strict=True)  # one at a time, for memory
    read = to_floats([x for e, n, f in parts for x in squares([e - n, n - f, n])])
    aparts, errors, sizes = ([square**0.5 for square in read[k::3]] for k in range(3))
    floor = math.hypot(*errors) if floor is None else floor
    wrong = [
        (apart / (size or apart), name)
        for name, apart, error, size in zip(names, aparts, errors, sizes, strict=True)
        if apart > MARGIN * error + CURVATURE * size + floor
    ]
    if not wrong:
        return ""
    worst, name = max(wrong)
    return f"an exact product differs by {worst:.0%} from differences of gradients in {name}"


def check_products(oracle: Oracle) -> str:
    """`disagreement` of the products with ∂F/∂w in the precision of training, by five passes.

    Raises:
        ProblemError: there are no differences of f, or no exact products.
    """
    b, pairs = oracle.upper_gradient.b, []
    with oracle.product("exact") as product:
        pairs.append(product.both(b))
    del product  # with its graph
    with oracle.product("difference") as difference:
        assert isinstance(difference, DifferenceProduct)
        pairs.append(difference.both(b))
        length = float(difference.length)
    with oracle.product("difference", epsilon=2 * length) as difference:
        pairs.append(difference.both(b))
    names = [f"{level.name}'s {n}" for level in (oracle.lower, oracle.upper) for n in level.names]
    exact, near, far = ((*of_w, *of_u) for of_w, of_u in pairs)
    return disagreement(names, exact, near, far)
