"""Methods by name, as the command line and comparisons have them."""

from __future__ import annotations

import re
import warnings

from hyperopt_peft import problems
from hyperopt_peft.errors import ProblemError, did_you_mean
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.utils import plugins

#: The entry points by which other distributions add methods.
GROUP = "hyperopt_peft.methods"
#: The classes of our methods by name, such as ``layer_scales`` for `LayerScales`.
METHODS = {
    re.sub("(?<=[a-z])(?=[A-Z][a-z]{2})", "_", made).lower(): made
    for made in vars(problems)["__all__"]
}


def find_method(spec: str) -> type[Method]:
    """The class of the method ``spec``: a name of `METHODS`, an entry point or ``file.py:Class``.

    Raises:
        ProblemError: an unknown name, a failed import, or no `Method` there.

    Example:
        >>> find_method("bidora")(gamma=1e-5)
        BiDoRA(gamma=1e-05, norm_grad='full', fast_dora=True, paper=False)
        >>> find_method("bidorra")
        Traceback (most recent call last):
        ...
        hyperopt_peft.errors.ProblemError: method: unknown 'bidorra'; did you mean 'bidora'?
    """
    path, colon, name = (f"{spec}:" if spec.endswith(".py") else spec).rpartition(":")
    others = plugins.names(GROUP)
    method: type[Method]
    if colon:
        method = plugins.class_in(path, name, Method, "method")
    elif spec in METHODS:
        if spec in others:
            warnings.warn(f"method: {spec!r} is the library's, not the entry point's", stacklevel=2)
        method = getattr(problems, METHODS[spec])
    elif spec in others:
        method = plugins.load(GROUP, spec, Method)
    else:
        near = did_you_mean(spec, [*METHODS, *others])
        raise ProblemError(f"method: unknown {spec!r}{near}")
    return method
