"""The cross-validated trusted losses of all methods on a head."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from hyperopt_peft.problems.fold_losses import FoldLosses, Run
from hyperopt_peft.problems.head import Head
from hyperopt_peft.problems.head_mix import HeadMix
from hyperopt_peft.problems.mix_plans import methods_of, settings_of, trusted_only, with_setting

#: The temperatures that are tried.
TEMPERATURES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 8.0)


def losses_on_head(mix: HeadMix, fold_of_row: Tensor, *, progress: bool = False) -> FoldLosses:
    """The losses of each method and setting that is tried.

    A trusted row's loss is of the head that is trained without its fold; that of a model that has
    learned nothing is of the best constant. The logits of a run are divided by the temperature of
    least loss (Guo et al. 2017, arXiv:1706.04599): a method is not to win by its confidence, which
    classes do not depend on.

    Args:
        mix: the head on all trusted rows.
        fold_of_row: the fold of each trusted row, ``(n,)``, from 0.
        progress: whether to show a progress bar.
    """
    result = FoldLosses(len(fold_of_row), untrained=torch.zeros(len(fold_of_row)))
    assert result.untrained is not None
    labels = mix.rows.trusted.labels
    temperatures = (1.0,) if labels.is_floating_point() else TEMPERATURES
    tempered: dict[Run, Tensor] = {}
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
                each = torch.stack(
                    [inside.losses(divided(head, t), held_out) for t in temperatures]
                )
                run = name, setting
                tempered.setdefault(run, each.new_zeros(len(each), mix.rows.n))[:, judged] = each
                result.passes[run] = planned + inside.passes - begin
            bar.update()
        result.row_weights.append(inside.row_weights(inside.learned))
        constant = replace(inside, rows=inside.rows.without_features())
        head = constant.fit(trusted_only(constant))
        result.untrained[judged] = constant.losses(head, held_out.without_features())
    bar.close()
    for run, losses in tempered.items():
        result.losses[run] = losses[losses.mean(1).argmin()]
    return result


@torch.no_grad()
def divided(head: Head, temperature: float) -> Head:
    """A head whose logits are those of ``head`` divided by ``temperature``."""
    other = copy.deepcopy(head)
    for parameter in other.parameters():
        parameter.div_(temperature)
    return other
