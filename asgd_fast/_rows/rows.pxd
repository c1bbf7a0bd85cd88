# The work of one step as the engines take it: rows of addresses, lengths and scalars.

from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport realloc

from asgd_fast._rows.dlpack cimport Borrowed
from asgd_fast._schedule cimport Plan, Scalars, Step

cdef enum:  # the roles of the three arrays of a row
    PARAM = 0
    GRAD = 1
    AX = 2

cdef enum:
    CACHE_LINE = 64  # bytes

cdef enum:
    CPU = -1  # the device of memory that the CPU reads and writes; GPUs are numbered from 0

cdef enum:  # the kinds of real numbers
    FLOAT16 = 0
    BFLOAT16 = 1
    FLOAT32 = 2
    FLOAT64 = 3
    N_KINDS = 4

# The update of one array, as small as a cache line: cold steps wait for what they touch.
cdef struct Row:
    void *param
    const void *grad
    void *ax               # NULL: no average is kept
    int64_t n              # real numbers: two for each element of a complex array
    int64_t offset         # where the param begins in the work of all rows, in bytes
    Step *step
    Scalars *scalars       # become step.next after the update; NULL: the caller keeps them
    short device           # CPU, or which GPU has the memory
    unsigned char kind     # of the numbers of param and grad
    unsigned char ax_size  # of those of ax in bytes: the same kind, or float32 or float64, wider
    int device_row         # the place in `DeviceRows`, from 1, if a GPU has the scalars; else 0


cdef inline int size_of(int kind) noexcept nogil:
    """The size of a number in bytes."""
    return 2 if kind <= BFLOAT16 else 4 if kind == FLOAT32 else 8


# Scalars that somebody may hold as tensors: they are written where those are, too.
cdef struct Mirror:
    const Scalars *scalars
    void *to[3]
    bint is_double[3]

cdef struct Span:  # the memory of one array of a row
    uintptr_t start
    uintptr_t stop
    int row
    int role

cdef class Rows:
    cdef Row *rows                  # in one block of memory with the steps and the spans
    cdef Py_ssize_t n_rows
    cdef Py_ssize_t _capacity
    cdef Span *_spans               # for the check
    cdef Step *_steps               # at most one for each row
    cdef Py_ssize_t _n_steps
    cdef bint _shares_step          # whether the next row may have the last step
    cdef Scalars _now               # of the last step
    cdef Plan _plan                 # likewise
    cdef Mirror *mirrors
    cdef Py_ssize_t n_mirrors
    cdef readonly int64_t cpu_bytes  # of all params of the CPU, each as whole cache lines
    cdef readonly bint has_gpu_rows
    # Where each GPU is to work, by its number: the stream of its first param, as `stream_of`; and
    # sets of the other streams on which libraries work, 0 for one that is not known.
    cdef readonly dict streams
    cdef readonly dict others
    cdef int device                 # whose stream was noted last; CPU: none was
    cdef uintptr_t _stream
    cdef public object device_rows  # a `DeviceRows`, where a GPU has scalars
    cdef Borrowed arrays[3]         # param, grad and ax of the row being made, before `put`
    cdef Borrowed *_borrowed            # what must be given back, of all rows
    cdef Py_ssize_t _n_borrowed
    cdef Py_ssize_t _borrowed_capacity
    cdef Py_ssize_t _n_borrowed_before  # the row that is being made
    cdef list _indices              # the places of params among the caller's, as far as known
    cdef readonly tuple names
    cdef list kept                  # what keeps the memory alive for as long as it is used

    cdef int begin_group(self, Py_ssize_t n) except -1
    cdef int reserve(self, Py_ssize_t more) except -1
    cdef Row *begin(self) noexcept
    cdef str put(self, int role)
    cdef bint _goes_with_param(self, int role) noexcept
    cdef Step *step_for(self, const Scalars *now, const Plan *plan) noexcept
    cdef int commit(self) except -1
    cdef int mirror(self, const Mirror *mirror) except -1
    cdef int note_stream(self, uintptr_t stream) except -1
    cdef void abandon(self) noexcept
    cdef void _give_back(self, Py_ssize_t keep) noexcept
    cdef int _keep_borrowed(self, Borrowed *borrowed) except -1
    cdef int _take(self, int role, object array, bint copies=*) except -1
    cdef bint _copy_grad(self) except -1
    cdef str _fault(self, int role)
    cdef str _mismatch(self, int role)
    cdef str name(self, int role, Py_ssize_t row)


cdef inline void *with_room(void *items, Py_ssize_t n, size_t size) except NULL:
    """Memory with room for one item more than the n that are there; moved at powers of two."""
    cdef void *moved
    if n & (n - 1) != 0:
        return items
    moved = realloc(items, max(<Py_ssize_t>1, 2 * n) * size)
    if moved == NULL:
        raise MemoryError
    return moved
