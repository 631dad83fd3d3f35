"""Corrected labels of training rows, from a file such as the ``suspects.csv`` of `attribute`."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset

from hyperopt_peft.cli.text.data import read_files, require_columns
from hyperopt_peft.errors import ProblemError, did_you_mean

ROW = "row"
OPTION = "corrections"


def corrected(
    rows: Dataset, files: Sequence[str], columns: Sequence[str]
) -> tuple[Dataset, Dataset, int]:
    """The training ``rows`` with the labels of ``files``; these; how many labels have changed.

    ``columns`` are those of the texts, then of the label. A line names its training row by number,
    and must have the same texts. The last line about a row counts, as in a second round of search.

    Raises:
        ProblemError: a column is missing or a cell empty; or a line has no row's number, another
            text or an unknown class.
    """
    lines, (*texts, label) = read_files(files, OPTION), columns
    require_columns(lines, [ROW, *columns], OPTION)
    labels, found = rows[label][:], dict[int, object]()
    classes = {_plain([value])[0]: value for value in labels}
    originals = list(zip(*(rows[name] for name in texts)))
    for line, (row, given, *words) in enumerate(zip(*(lines[x] for x in [ROW, label, *texts])), 2):
        where = f"{OPTION}: line {line}"
        if row not in range(len(rows)):
            raise ProblemError(
                f"{where}: there is no row {row!r}; the training examples are rows 0 to "
                f"{len(rows) - 1}"
            )
        if _plain(words) != _plain(originals[int(row)]):
            raise ProblemError(
                f"{where}: row {row} of the training examples has another text; give the "
                "train_file that attribute has read"
            )
        (name,) = _plain([given])
        if name not in classes:
            raise ProblemError(
                f"{where}: the label {given!r} is not in the training examples"
                f"{did_you_mean(name, classes)}; correct it"
            )
        found[int(row)] = classes[name]
    new = [found.get(row, value) for row, value in enumerate(labels)]
    count = sum(value != old for value, old in zip(new, labels, strict=True))
    kind = rows.features[label]
    return rows.remove_columns(label).add_column(label, new, feature=kind), lines, count


def _plain(texts: Sequence[object]) -> list[str]:
    """``texts`` without what spreadsheets change: spaces, and the apostrophe before a formula."""
    return [" ".join(str(text).split()).removeprefix("'") for text in texts]
