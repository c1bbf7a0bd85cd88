"""Params and averages of a torch optimizer that trade places.

This module knows states and their memory; it does not know when averages are wanted.
"""

from libc.stdint cimport int64_t

from asgd_fast._rows.describe cimport n_elements
from asgd_fast._rows.dlpack cimport Borrowed, give_back, stream_of
from asgd_fast._rows.rows cimport AX, CPU, GRAD, PARAM, Row, Rows
from asgd_fast._torch.memory cimport borrow_tensor, is_ordinary
from asgd_fast._torch.parts cimport part_of
from asgd_fast._torch.record cimport Record

from asgd_fast._torch.conversions import extent


cdef class Pair:
    """A param and its average, which trade places.

    Parameters
    ----------
    record : Record
        With an average.

    Attributes
    ----------
    memory : Tensor
        The param's own, wherever the param itself may be put meanwhile.
    spare : Tensor or None
        Holds the param meanwhile; None where the memory of the average does.
    ax : Tensor
    by_torch : bool
        Whether torch exchanges them rather than an engine.
    is_whole : bool
        Whether the memory to be exchanged was still there when `look` was called last.

    Raises
    ------
    RuntimeError
        The memory of one of them was taken away.
    """

    cdef Record _record
    cdef object _param
    cdef readonly object memory
    cdef readonly object spare
    cdef readonly object ax
    cdef readonly bint by_torch
    cdef readonly bint is_whole
    cdef object _iterate  # a copy, where the param was put elsewhere

    def __cinit__(self, Record record):
        self._record, self._param, self.ax = record, record.param, record.average()
        self.memory = self._param.detach()
        self.look()
        if not self.is_whole:
            raise RuntimeError(
                "averaged_parameters: the memory of a param, or of its average, of shape "
                f"{tuple(self._param.shape)} was taken away")
        self.spare = self.memory.clone() if self.ax.dtype != self._param.dtype else None

    def leave_to_torch(self):
        """Have memory for the param, so that torch can repeat each half of the exchange."""
        if self.ax.shape != self._param.shape:
            raise ValueError(
                f"state: 'ax' of shape {tuple(self.ax.shape)} does not match its param of shape "
                f"{tuple(self._param.shape)}")
        self.by_torch = True
        if self.spare is None:
            self.spare = self.memory.clone()

    def put_average(self):
        """Put the average into the param, or let the state show that an engine has."""
        if self.by_torch:
            self._param.detach().copy_(self.ax)
        elif self.spare is None:
            self._record.ax, self._record.source = None, self.memory

    def look(self):
        """Look whether the memory to be exchanged is still there."""
        self.is_whole = _has_memory(self.memory) and (
            not self._record.is_shown or _has_memory(self.ax))  # else nobody else has it

    def keep(self):
        """Copy the iterate, if the param was given other memory: it may be another param's."""
        if (
            not self.by_torch and self._iterate is None and self.is_whole
            and _address(self._param) != _address(self.memory)
        ):
            self._iterate = self.memory.clone()

    def put_back(self):
        """Put the param back, or let the state show that an engine has; may be repeated.

        False if its memory was taken away, so that it does not have its iterate.
        """
        if not self.by_torch and self._record.source is self.memory:
            self._record.ax, self._record.source = self.ax, self._param
        if not (self.is_whole or self.by_torch):
            return False
        is_moved = self.by_torch or _address(self._param) != _address(self.memory)
        if is_moved and not _has_memory(self._param):
            return False
        iterate = self.spare if self.by_torch else self._iterate
        if iterate is not None:
            self._param.detach().copy_(iterate)
        return True


def rows_of(list pairs):
    """Return the rows of pairs, not checked for overlaps, and the places of pairs without one."""
    cdef Rows rows = Rows(("params[{}]", "spare memory[{}]", "averages[{}]"))
    cdef Row *row
    cdef Pair pair
    cdef list refused = []
    rows.begin_group(len(pairs))
    for i, pair in enumerate(pairs):
        row = rows.begin()
        row.step = NULL
        if not (
            pair.is_whole
            and is_ordinary(pair.memory) == is_ordinary(pair.ax)
            and _borrow(rows, PARAM, pair.memory, None, False)
            and _borrow(rows, AX, pair.ax, pair.memory, not pair._record.is_shown)
            and (pair.spare is None or _borrow(rows, GRAD, pair.spare, pair.memory, True))
        ):
            rows.abandon()
            refused.append(i)
            continue
        if row.device != CPU and row.device != rows.device:
            rows.note_stream(stream_of(rows.kept[len(rows.kept) - 1], row.device))
        rows.commit()
    return rows, refused


def written_of(list pairs):
    """Return the tensors that an engine writes, as far as a graph of autograd may have them."""
    cdef Pair pair
    cdef list written = []
    for pair in pairs:
        if not pair.memory.is_inference():
            written.append(pair.memory)
        if pair.spare is None and pair._record.is_shown and not pair.ax.is_inference():
            written.append(pair.ax)
    return written


cdef bint _borrow(Rows rows, int role, tensor, like, bint is_own) except -1:
    """Put a tensor, or this rank's part of a DTensor, into the row. False if no engine can."""
    if not is_ordinary(tensor):
        tensor = part_of(tensor, like)
        if tensor is None:
            return False
    rows.kept.append(tensor)
    return (
        borrow_tensor(tensor, True, &rows.arrays[role], is_own) and rows.put(role) is None)


cdef bint _has_memory(tensor) except -1:
    """Whether the memory of a tensor, or of a DTensor's part, has room for its elements.

    Somebody may have made the storage smaller, which torch's operations do not notice. Tensors of
    other kinds are taken to have it.
    """
    cdef Borrowed borrowed
    cdef int64_t reach = 1  # how many elements there are from the first one to the last in memory
    cdef int i
    if not is_ordinary(tensor):
        tensor = part_of(tensor)
    if tensor is None or not borrow_tensor(tensor, False, &borrowed, True):
        return True
    cdef int64_t n = n_elements(&borrowed.tensor)
    if borrowed.tensor.strides == NULL:
        reach = n
    else:
        for i in range(borrowed.tensor.ndim):
            reach += (borrowed.tensor.shape[i] - 1) * borrowed.tensor.strides[i]
    give_back(&borrowed)
    return n == 0 or (tensor.storage_offset() + reach) * tensor.itemsize <= (
        tensor.untyped_storage().nbytes())


cdef object _address(tensor):
    """Where the memory begins, of a DTensor this rank's; 0 if it has no address."""
    return tensor.data_ptr() if is_ordinary(tensor) else extent(tensor)[0]
