from asgd_fast._rows.rows cimport Row, Span

cdef bint find_overlap(
    const Row *rows, Py_ssize_t n_rows, Span *room, Span *late, Span *early) noexcept
