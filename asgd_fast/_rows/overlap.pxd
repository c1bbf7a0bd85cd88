from asgd_fast._rows.rows cimport Row, Span

cdef bint find_overlap(
    const Row *rows, Py_ssize_t n_rows, Span *room, Span *late, Span *early) noexcept
cdef bint any_touches(
    const Row *rows, Py_ssize_t n_rows, Span *room, Py_ssize_t n_outside) noexcept
