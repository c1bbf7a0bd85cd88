from libc.stdint cimport uintptr_t

from asgd_fast._rows.rows cimport Row

cdef struct Span:  # the memory of one array of a row
    uintptr_t start
    uintptr_t stop
    int row
    int role

cdef bint find_overlap(const Row *rows, Py_ssize_t n_rows, Span *late, Span *early) except -1
