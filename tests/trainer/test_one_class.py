"""One Trainer class: no base class reads what only a subclass sets, and a step is a short walk."""

from __future__ import annotations

import ast
import inspect
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hyperopt_peft
from hyperopt_peft.attribution.recorder import RecordedTrainer
from hyperopt_peft.problems import LayerScales
from tests.support.methods import method_trainer

PACKAGE = Path(hyperopt_peft.__file__).parent


@dataclass
class Names:
    """The names that a class defines or sets, those that it reads, and those without a value."""

    own: set[str]
    read: set[str]
    empty: set[str]

    @classmethod
    def of(cls, kind: type) -> Names:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        found = cls({*vars(kind)}, set(), set())
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and node.value is None:
                found.empty.add(ast.unparse(node.target))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                (found.own if isinstance(node.ctx, ast.Store) else found.read).add(node.attr)
        return found


def test_no_base_class_reads_a_name_that_only_a_subclass_sets() -> None:
    kinds = [x for x in reversed(RecordedTrainer.__mro__) if x.__module__.startswith("hyperopt")]
    names, above = [Names.of(kind) for kind in kinds], set[str]()
    assert [kind.__name__ for kind in kinds][:2] == ["CombinedTrainer", "BilevelTrainer"]
    for number, each in enumerate(names[:-1]):
        above |= each.own
        below = set[str]().union(*(x.own for x in names[number + 1 :]))
        assert not (each.read - above) & below
        assert not each.empty


def test_from_train_to_the_backward_pass_of_the_upper_loss_are_seven_files(tmp_path: Path) -> None:
    walks = []

    class Watched(LayerScales):
        def upper_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
            loss = task_loss(batch)
            loss.register_hook(lambda _: walks.append(traceback.extract_stack()))
            return loss

    method_trainer(tmp_path, method=Watched(), max_steps=2, retrain="none").train()
    files = {Path(frame.filename) for frame in walks[0]}
    ours = sorted(str(x.relative_to(PACKAGE)) for x in files if x.is_relative_to(PACKAGE))
    assert "trainer/trainer.py" in ours and "hypergradients/oracle.py" in ours
    assert len(ours) <= 7, ours
