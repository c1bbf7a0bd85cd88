"""Finds arrays that share memory before a step writes any of them. This module knows only rows."""

from libc.stdint cimport int64_t, uintptr_t

from asgd_fast._rows.rows cimport AX, GRAD, PARAM, Row, Span, size_of

cdef enum:
    OUTSIDE = 3  # the role of memory that is in no row


cdef bint find_overlap(
    const Row *rows, Py_ssize_t n_rows, Span *room, Span *late, Span *early,
) noexcept:
    """Whether an array that is written shares memory with another; the two, the later one first.

    There is room for six spans a row.
    """
    cdef Py_ssize_t n = _spans_of(rows, n_rows, room)
    return _sweep(_sorted(room, room + 3 * n_rows, n), n, late, early)


cdef bint any_touches(
    const Row *rows, Py_ssize_t n_rows, Span *room, Py_ssize_t n_outside,
) noexcept:
    """Whether an array of the rows shares memory with one of the spans from room[3 * n_rows] on.

    There is room for twice as many spans as three a row and those outside.
    """
    cdef Py_ssize_t n = _spans_of(rows, n_rows, room), i
    cdef Span *outside = room + 3 * n_rows
    cdef Span *spans
    for i in range(n_outside):
        if outside[i].start < outside[i].stop:
            room[n] = Span(outside[i].start, outside[i].stop, 0, OUTSIDE)
            n += 1
    spans = _sorted(room, room + 3 * n_rows + n_outside, n)
    cdef uintptr_t stop[2]  # how far the arrays of the rows, and those outside, reach so far
    cdef int is_outside
    stop[0] = stop[1] = 0
    for i in range(n):
        is_outside = spans[i].role == OUTSIDE
        if spans[i].start < stop[1 - is_outside]:
            return True
        stop[is_outside] = max(stop[is_outside], spans[i].stop)
    return False


cdef Py_ssize_t _spans_of(const Row *rows, Py_ssize_t n_rows, Span *room) noexcept:
    """List the memory of all arrays of the rows; the number of spans."""
    cdef Py_ssize_t n = 0, i
    cdef int role
    cdef int64_t size
    cdef const Row *row
    cdef const void *address
    # Each role by itself: libraries often hand out memory in order, which spares the sort.
    for role in range(3):
        for i in range(n_rows):
            row = &rows[i]
            address = row.param if role == PARAM else row.grad if role == GRAD else row.ax
            size = row.n * (row.ax_size if role == AX else size_of(row.kind))
            if size != 0 and address != NULL:
                room[n] = Span(<uintptr_t>address, <uintptr_t>address + size, i, role)
                n += 1
    return n


cdef bint _sweep(const Span *spans, Py_ssize_t n, Span *late, Span *early) noexcept:
    """Go through spans in the order of their starts, with those that reach furthest so far."""
    cdef Py_ssize_t i
    cdef const Span *furthest = NULL          # of all spans
    cdef const Span *furthest_written = NULL  # of those that are written
    cdef const Span *span
    cdef const Span *other
    for i in range(n):
        span = &spans[i]
        other = furthest_written if span.role == GRAD else furthest
        if other != NULL and span.start < other.stop:
            if span.row < other.row or (span.row == other.row and span.role < other.role):
                late[0], early[0] = other[0], span[0]
            else:
                late[0], early[0] = span[0], other[0]
            return True
        if furthest == NULL or span.stop > furthest.stop:
            furthest = span
        if span.role != GRAD:  # written spans do not overlap, so the last one reaches furthest
            furthest_written = span
    return False


cdef Span *_sorted(Span *spans, Span *spare, Py_ssize_t n) noexcept:
    """Merge the runs that are in order already, forwards or backwards, until one is left."""
    cdef Py_ssize_t start, middle, stop, n_runs = 2
    while n_runs > 1:
        n_runs = start = 0
        while start < n:
            middle = _end_of_run(spans, start, n)
            stop = _end_of_run(spans, middle, n)
            _merge(spans, spare, start, middle, stop)
            start = stop
            n_runs += 1
        spans, spare = spare, spans
    return spans


cdef Py_ssize_t _end_of_run(Span *spans, Py_ssize_t start, Py_ssize_t n) noexcept:
    """Where the run from `start` ends; a descending one is turned round."""
    cdef Py_ssize_t stop = start + 1, last
    if stop < n and spans[stop].start < spans[start].start:
        while stop < n and spans[stop].start < spans[stop - 1].start:
            stop += 1
        last = stop - 1
        while start < last:
            spans[start], spans[last] = spans[last], spans[start]
            start += 1
            last -= 1
    else:
        while stop < n and spans[stop].start >= spans[stop - 1].start:
            stop += 1
    return min(stop, n)


cdef void _merge(
    const Span *spans, Span *into, Py_ssize_t start, Py_ssize_t middle, Py_ssize_t stop,
) noexcept:
    """Merge spans[start:middle] and spans[middle:stop], each in order, into[start:stop]."""
    cdef Py_ssize_t left = start, right = middle, i
    for i in range(start, stop):
        if right == stop or (left < middle and spans[left].start <= spans[right].start):
            into[i] = spans[left]
            left += 1
        else:
            into[i] = spans[right]
            right += 1
