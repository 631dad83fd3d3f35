"""Simple ways that the library does not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hyperopt_peft import Method
from hyperopt_peft.problems import LoRA, TrustedRepeated

FOLDS = 5


@dataclass
class KeptRows(TrustedRepeated):
    """The trusted rows ``times`` times, and the other rows with the most likely labels.

    A head on frozen features gives the likelihood. With ``trusted`` the head is trained on the
    trusted rows, else on the other folds of the rows themselves. As many rows are left out as
    `wrong_share` estimates.
    """

    times: int = 1
    trusted: bool = True

    def all_rows(self, train: Any, upper: Any) -> Any:
        """The rows with likely labels, and the trusted rows."""
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        x, labels = _columns(train)
        known = _columns(upper)
        wrong = wrong_share(head, x, labels, *known)
        if self.trusted:
            classes = head.fit(*known).classes_
            found = head.predict_proba(x)
        else:
            classes = np.unique(labels)
            found = cross_val_predict(head, x, labels, cv=FOLDS, method="predict_proba")
        likely = (found * (labels[:, None] == classes)).sum(1)
        best = np.argsort(-likely, kind="stable")[: round((1 - wrong) * len(likely))]
        return super().all_rows(train.select(np.sort(best)), upper)


def wrong_share(head: Any, x: Any, labels: Any, known: Any, classes: Any) -> float:
    """The share of wrong ``labels``, by a head that is trained on trusted rows, at most 0.9.

    A head that is right with probability q, and else predicts each of the other C − 1 classes
    alike, agrees with a = (1 − e)·q + e·(1 − q)/(C − 1) of the labels if a share e of them is wrong
    at random; q is its accuracy on held-out folds of the trusted rows.

    Example:
        >>> class Always(LogisticRegression):
        ...     def predict(self, x):
        ...         return x[:, 0].astype(int)
        >>> known, wrong = np.tile([0, 1], 10), np.array([0, 1, 1, 0, 0, 1, 0, 1])
        >>> x = np.array([0, 1, 0, 1, 0, 1, 0, 1])
        >>> wrong_share(Always(), x[:, None], wrong, known[:, None], known)
        0.25
    """
    number = len(np.unique(classes))
    q = np.mean(cross_val_predict(head, known, classes, cv=FOLDS) == classes)
    agreed = np.mean(head.fit(known, classes).predict(x) == labels)
    least = (1 - q) / (number - 1)
    return float(np.clip((q - agreed) / max(q - least, 1e-6), 0, 0.9))


def _columns(rows: Any) -> tuple[Any, Any]:
    """The frozen features of ``rows``, and their classes."""
    target = "target" if "target" in rows.column_names else "labels"
    return np.array(rows["states"][:]), np.array(rows[target][:])


@dataclass
class DecayedLoRA(LoRA):
    """LoRA with weight decay in the optimizer."""

    decay: float = 0.1

    def __post_init__(self) -> None:
        """Set the weight decay."""
        super().__post_init__()
        with_arguments(self, weight_decay=self.decay)


def with_arguments(method: Method, **arguments: Any) -> Method:
    """``method`` with other default training arguments."""
    method.defaults = {**method.defaults, **arguments}
    return method
