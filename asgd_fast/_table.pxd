# The work of one step as the engines take it: rows of addresses, lengths and scalars.

from libc.stdint cimport int64_t

from asgd_fast._dlpack cimport Borrowed, DLDataType

# The scalars of one param, as the optimizer packs them: they are advanced with the step.
cdef struct Scalars:
    double step
    double eta
    double mu

# One array's update. The scalars are double here; a loop rounds each once to its compute dtype.
cdef struct Row:
    void *param
    const void *grad
    void *ax                # NULL: no average is kept
    int64_t n               # elements
    DLDataType dtype        # of param, grad and ax
    double eta
    double mu               # 1: the average is the param itself
    double decay            # 1 - lambd * eta
    double weight_decay
    double grad_scale       # negative to maximize
    Scalars *scalars        # NULL: the caller keeps the schedule
    double lr
    double lambd
    double alpha
    double t0
    Py_ssize_t index        # the param's place among the caller's, for messages


cdef class Table:
    cdef Row *rows
    cdef Py_ssize_t n_rows
    cdef Py_ssize_t _capacity
    cdef Borrowed (*_borrowed)[3]   # param, grad and ax of each row
    cdef tuple _names
    cdef list _owners               # keeps the arrays alive for as long as they are borrowed

    cdef void _clear(self) noexcept
    cdef int _reserve(self, Py_ssize_t more) except -1
    cdef Row *_append(self, Py_ssize_t index, param) except NULL
    cdef int _take(self, int role, object array) except -1
    cdef int _check_alone(self, int role) except -1
    cdef int _check_match(self, int role) except -1
    cdef str _mismatch(self, str what, got, wanted)
    cdef str _name(self, int role, Py_ssize_t row)
