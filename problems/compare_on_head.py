"""The cross-validated trusted losses of all methods on a head."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from hyperopt_peft.problems.fold_losses import FoldLosses
from hyperopt_peft.problems.head_mix import HeadMix
from hyperopt_peft.problems.mix_plans import methods_of, settings_of, trusted_only, with_setting


def losses_on_head(mix: HeadMix, fold_of_row: Tensor, *, progress: bool = False) -> FoldLosses:
    """The losses of each method and setting that is tried.

    A trusted row's loss is of the head that is trained without its fold; that of a model that has
    learned nothing is of the best constant.

    Args:
        mix: the head on all trusted rows.
        fold_of_row: the fold of each trusted row, ``(n,)``, from 0.
        progress: whether to show a progress bar.
    """
    result = FoldLosses(len(fold_of_row), untrained=torch.zeros(len(fold_of_row)))
    assert result.untrained is not None
    methods = methods_of(mix)
    bar = tqdm(
        total=len(methods) * int(fold_of_row.max() + 1), desc="methods", disable=not progress
    )
    for fold in fold_of_row.unique().tolist():
        judged = (fold_of_row == fold).nonzero().flatten()
        held_out = mix.rows.with_trusted(judged)
        kept = (fold_of_row != fold).nonzero().flatten()
        inside = replace(mix, rows=mix.rows.with_trusted(kept), passes=0)
        for name, method in methods.items():
            begin = inside.passes
            plan = method(inside)
            planned = max(plan.passes, inside.passes - begin)  # a search is done once
            head = None
            for setting in settings_of(name):
                begin = inside.passes
                head = inside.fit(with_setting(plan, setting), head)
                each = inside.losses(head, held_out)
                result.add((name, setting), judged, each, planned + inside.passes - begin)
            bar.update()
        result.row_weights.append(inside.row_weights(inside.learned))
        constant = replace(inside, rows=inside.rows.without_features())
        head = constant.fit(trusted_only(constant))
        result.untrained[judged] = constant.losses(head, held_out.without_features())
    bar.close()
    return result
