"""One in-place update of many arrays: from the caller's arguments to an engine.

This module knows sequences of arrays and which engine takes them; it does not know groups,
schedules or how the pass is made.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from asgd_fast import _core
from asgd_fast._table import Table, is_array
from asgd_fast.threads import threads_for

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["as_arrays", "copy", "lent", "template", "update"]


def as_arrays(name: str, arrays: Any) -> list[Any]:
    """Return one array or an iterable of arrays as a new list.

    Parameters
    ----------
    name : str
        What messages call the argument.
    arrays : array or iterable of array
        The elements are not looked at.

    Returns
    -------
    list of array

    Raises
    ------
    TypeError
        `arrays` is neither, or a set or mapping, which have no order to rely on.
    """
    if is_array(arrays):
        return [arrays]
    try:
        if isinstance(arrays, (str, bytes, set, frozenset)) or hasattr(arrays, "keys"):
            raise TypeError
        elements = iter(arrays)
    except TypeError:
        raise TypeError(
            f"{name}: expected an array or a sequence of arrays, got {type(arrays).__name__}"
        ) from None
    return list(elements)


def template(name: str, arrays: Any) -> str:
    """Return what messages call the i-th array of an argument, as a format string of i."""
    return name if is_array(arrays) else f"{name}[{{}}]"


@contextmanager
def lent(spare: list[Table], names: tuple[str, str, str]) -> Iterator[Table]:
    """Lend an empty table, which remembers the arrays that it held last.

    Parameters
    ----------
    spare : list of Table
        Those that nobody uses at the moment; a new one is made when there is none.
    names : tuple of str
        As for `Table`.
    """
    try:
        table = spare.pop()
    except IndexError:
        table = Table(names)
    table.names = names
    try:
        yield table
    finally:
        table.clear()
        spare.append(table)


def update(table: Table) -> None:
    """Make the step that the table lists, in place.

    Parameters
    ----------
    table : Table
        With a grad in every row.

    Raises
    ------
    ValueError
        Two arrays share memory, and one of them is written. Nothing is changed.
    """
    table.check_overlap()
    _core.update(table, threads_for(table))


def copy(table: Table) -> None:
    """Copy each grad of the table over its param, in place.

    Parameters
    ----------
    table : Table
        With a grad, the source, in every row.

    Raises
    ------
    ValueError
        Two arrays share memory, and one of them is written. Nothing is changed.
    """
    table.check_overlap()
    _core.copy(table)
