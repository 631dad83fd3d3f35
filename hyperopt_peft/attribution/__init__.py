"""Scores of training rows: the hypergradient with respect to one weight per row.

    s_i = dΦ(w_T(v))/dv_i   at v = 1,   w_{t+1} = step(w_t, ∂/∂w 1/B Σ_{i in batch t} v_i ℓ_i(w_t))

``level``, ``trainer`` and ``head`` train a level of your own, a Trainer, or a head on its features;
each returns `Trained`. From there one path leads to the scores (``scores``, through the steps of a
``run``), to what holds them (``result``), to their ``check``, and to labels that may be wrong
(``suspects``). ``why`` explains predictions of a head.
"""

from hyperopt_peft.attribution.attribute import attribute
from hyperopt_peft.attribution.check import ScoreCheck
from hyperopt_peft.attribution.reasons import Reason, Reasons
from hyperopt_peft.attribution.result import Attribution
from hyperopt_peft.attribution.why import why

__all__ = ["Attribution", "Reason", "Reasons", "ScoreCheck", "attribute", "why"]
