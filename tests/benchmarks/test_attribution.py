"""The arithmetic of benchmarks/attribution."""

import pytest
import torch

from benchmarks.attribution import scores
from benchmarks.attribution.runs import actual, planted, random_rows
from hyperopt_peft.attribution.check import metasmoothness
from hyperopt_peft.attribution.scores import parse_estimator
from tests.support.attributed import ROWS, levels, scored, setup_of


def test_planted_noise_has_its_share_and_its_kind() -> None:
    labels = torch.arange(300) % 3
    for noise in ("uniform", "class-dependent"):
        found = planted(labels, 3, noise, 0.2, torch.Generator().manual_seed(0))
        changed = found != labels
        assert int(changed.sum()) == 60 and int(found.max()) < 3
        turned = (found[changed] == (labels[changed] + 1) % 3).double().mean()
        assert turned == 1 if noise == "class-dependent" else 0.3 < turned < 0.7
    assert torch.equal(planted(labels, 3, "none", 0.2, torch.Generator()), labels)


def test_retrainings_are_those_of_the_check() -> None:
    result = scored(levels())
    setting, masks = setup_of(result), random_rows(ROWS, 0.1, 6, seed=3)
    check = result.check(6, share=0.1, perturbation=None, seed=3)
    assert torch.allclose(actual(setting, masks), check.actual, rtol=1e-12, atol=1e-14)
    assert scores.predicted(result.scores, masks) == pytest.approx(check.predicted.tolist())
    source = torch.Generator().manual_seed(3)
    smooth = metasmoothness(setting, parse_estimator("unrolled"), result.scores, 0.1, source)
    assert smooth > 0.95
