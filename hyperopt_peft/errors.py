"""The errors of this library: each says what is wrong, where, and what to do."""


class ProblemError(ValueError):
    """A level, a pair of levels or an option that cannot be trained as it is."""


class NonFiniteError(FloatingPointError):
    """A loss, gradient or curvature that is NaN or infinite."""
