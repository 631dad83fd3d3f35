"""Which training rows help or hurt: the hypergradient with respect to one weight a row.

    s_i = dΦ(w_T(v))/dv_i   at v = 1,   w_{t+1} = step(w_t, ∂/∂w 1/B Σ_{i in batch t} v_i ℓ_i(w_t))

``run`` has the training run, ``evaluation`` Φ, ``scores`` and ``result`` the scores; ``check``
tells whether they can be trusted; ``levels``, ``trainer`` and ``head`` train one's own levels, a
Trainer, and a head on its features; ``why`` has the rows behind predictions of a head.
"""

from hyperopt_peft.attribution.attribute import attribute
from hyperopt_peft.attribution.check import ScoreCheck
from hyperopt_peft.attribution.reasons import Reason, Reasons
from hyperopt_peft.attribution.result import Attribution

__all__ = ["Attribution", "Reason", "Reasons", "ScoreCheck", "attribute"]
