"""Files of `attribute` in a later run: corrected labels, and digests of the rows that scored.

A row that has scored training rows cannot test the use of the scores. The digests are in a column,
so that they stay where a file is renamed, sorted or edited.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import sha256

from datasets import Dataset
from transformers.utils import logging

from hyperopt_peft.cli.text.data import read_files, require_columns
from hyperopt_peft.errors import ProblemError, did_you_mean

logger = logging.get_logger(__name__)
ROW, OPTION = "row", "corrections"  # `ROW` has the number of a training row in its file
#: The columns of digests, and of the first row with the same text where their labels differ.
COLUMN, SAME_TEXT = "scored_on", "same_text"


def digests_of(rows: Dataset, columns: Sequence[str]) -> list[str]:
    """A digest of each row, by its inputs: all of ``columns`` but the last, the label.

    Example:
        >>> rows = Dataset.from_dict({"text": ["a b", "a  b "], "label": [0, 1]})
        >>> len({*digests_of(rows, ["text", "label"])})
        1
    """
    inputs = columns[:-1] or columns
    texts = (" ".join(" ".join(map(str, x)).split()) for x in zip(*(rows[c] for c in inputs)))
    # The letter keeps spreadsheets from reading a number.
    return [f"r{sha256(text.encode('utf-8', 'replace')).hexdigest()[:12]}" for text in texts]


def as_column(digests: Collection[str], count: int) -> list[str]:
    """``digests`` in ``count`` cells, of which each has one or more.

    Example:
        >>> as_column({"b", "a"}, 3), as_column({"b", "a"}, 1)
        (['a', 'b', 'a'], ['a b'])
    """
    each = sorted({*digests})
    return [" ".join(each[k::count] or each[k % len(each) :][:1]) for k in range(count)]


def digests_in(rows: Dataset) -> set[str]:
    """The digests in the column of ``rows``, none without one."""
    cells = rows[COLUMN][:] if COLUMN in rows.column_names else []
    return {digest for cell in cells if cell is not None for digest in str(cell).split()}


def contradicted(rows: Dataset, columns: Sequence[str]) -> dict[int, int]:
    """Warn of rows whose inputs have other labels too; by these rows the first of these inputs."""
    labels, groups = rows[columns[-1]][:], dict[str, list[int]]()
    for row, digest in enumerate(digests_of(rows, columns)):
        groups.setdefault(digest, []).append(row)
    found = [x for x in groups.values() if any(labels[row] != labels[x[0]] for row in x)]
    if count := sum(map(len, found)):
        some = [" and ".join(map(str, x[:5])) for x in found[:5]]
        if len(found) > 5:
            some.append("…")
        text = "training examples share their text with one of another label; correct them: rows"
        logger.warning_once(f"{count} {text} {'; '.join(some)} (from 0)")
    return {row: x[0] for x in found for row in x}


def corrected(rows: Dataset, file: str, columns: Sequence[str]) -> tuple[Dataset, Dataset]:
    """The training ``rows`` with the labels of ``file``, and the lines of ``file``.

    ``columns`` are those of the texts, then of the label. A line names its training row by number,
    and must have the same texts.

    Raises:
        ProblemError: a column is missing or a cell empty; or a line has no row's number, another
            text, an unknown class, or another class than an earlier line about the row.
    """
    lines, (*texts, label) = read_files([file], OPTION), columns
    require_columns(lines, [ROW, *columns], OPTION)
    labels, found = rows[label][:], dict[int, tuple[int, object]]()
    classes = {_plain([value])[0]: value for value in labels}
    originals = list(zip(*(rows[name] for name in texts)))
    for line, (row, given, *words) in enumerate(zip(*(lines[x] for x in [ROW, label, *texts])), 2):
        where = f"{OPTION}: {file}: line {line}"
        if row not in range(len(rows)):
            raise ProblemError(f"{where}: there is no row {row!r}; rows are 0 to {len(rows) - 1}")
        if _plain(words) != _plain(originals[int(row)]):
            raise ProblemError(
                f"{where}: row {row} of train_file has another text; give the file of attribute"
            )
        (name,) = _plain([given])
        if name not in classes:
            text = f"the label {given!r} is not in the training examples"
            raise ProblemError(f"{where}: {text}{did_you_mean(name, classes)}")
        first, other = found.setdefault(int(row), (line, classes[name]))
        if other != classes[name]:
            raise ProblemError(f"{where}: line {first} gives row {row} another label; remove one")
    new = [found.get(row, (0, value))[1] for row, value in enumerate(labels)]
    kind = rows.features[label]
    return rows.remove_columns(label).add_column(label, new, feature=kind), lines


def _plain(texts: Sequence[object]) -> list[str]:
    """``texts`` without what spreadsheets change: spaces, and the apostrophe before a formula."""
    return [" ".join(str(text).split()).removeprefix("'") for text in texts]
