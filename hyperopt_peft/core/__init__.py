"""One level of a bilevel program: its variables, loss, data, optimizer and prior."""

from hyperopt_peft.core.prior import GaussianPrior

__all__ = ["GaussianPrior"]
