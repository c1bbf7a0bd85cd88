# The work of one step as the engines take it: rows of addresses, lengths and scalars.

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uintptr_t

from asgd_fast._rows.dlpack cimport Borrowed, Known
from asgd_fast._schedule cimport Plan, Scalars

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

# One array's update. The scalars are double here; a loop rounds each once to its compute dtype.
cdef struct Row:
    int device              # CPU, or which GPU has the memory
    void *param
    const void *grad
    void *ax                # NULL: no average is kept
    int64_t n               # real numbers: two for each element of a complex array
    int kind                # of the numbers of param and grad
    int size                # of each, in bytes
    int ax_size             # of those of ax: the same kind, or wider ones, float32 or float64
    double eta
    double mu               # 1: the average is the param itself
    double decay            # 1 - lambd * eta
    double weight_decay
    double grad_scale       # negative to maximize
    void *scalars           # step, eta and mu, to become `next`; NULL: the caller keeps them
    bint double_scalars     # whether they are double rather than float
    Scalars next
    int on_device           # if a GPU has the scalars: which of the table's, from 1; else 0
    Py_ssize_t index        # the param's place among the caller's, for messages
    int64_t offset          # where the param begins in the work of the table, in bytes


# The scalars of a row that the GPU has in its memory, and advances.
cdef struct OnDevice:
    void *scalars
    Plan plan            # what they follow from
    const void *lr       # where the GPU has it, instead of the plan's; NULL: that holds
    bint double_lr
    void *ticket         # one 32-bit zero beside the scalars, where blocks count themselves


cdef struct Memory:  # of one row
    const void *param
    const void *grad
    const void *ax
    int64_t size     # in bytes, of param and grad
    int64_t ax_size


cdef struct Span:  # of one array
    uintptr_t start
    uintptr_t stop
    Py_ssize_t row
    int role


cdef class Rows:
    cdef Row *rows
    cdef Py_ssize_t n_rows
    cdef readonly int64_t work      # the bytes of all params of the CPU, each as whole cache lines
    cdef readonly bint has_gpu_rows
    cdef OnDevice *on_device
    cdef Py_ssize_t _n_on_device
    cdef Py_ssize_t _on_device_capacity
    # Where each GPU is to work, by its number: as `stream_of`, of its first param. And sets of the
    # other streams on which libraries work, 0 for one that is not known.
    cdef readonly dict streams
    cdef readonly dict others
    cdef int device                 # of which a stream was noted last, CPU if of none
    cdef uintptr_t _stream          # and which
    cdef public object grad_scale   # tensors of one float32 in the memory of each GPU, by its
    cdef public object found_inf    # number: for rows with scalars there; else None
    cdef Py_ssize_t _capacity
    cdef Borrowed arrays[3]         # param, grad and ax of the row being made, before `settle`
    cdef Borrowed *_lent            # what must be given back, of all rows
    cdef Py_ssize_t _n_lent
    cdef Py_ssize_t _n_lent_before  # the row that is being made
    cdef Memory *_checked           # of the rows that were last found free of overlap
    cdef Py_ssize_t _n_checked
    cdef Known *_known              # three for each row, kept over the steps
    cdef Span *_spans               # room for those of all rows, twice
    cdef public tuple names
    cdef list _spare                # of those where it belongs while nobody uses it; or None
    cdef PyObject **_owners         # what keeps the arrays alive for as long as they are borrowed
    cdef Py_ssize_t _n_owners
    cdef Py_ssize_t _owner_capacity

    cdef int reserve(self, Py_ssize_t more) except -1
    cdef Row *begin(self, Py_ssize_t index) noexcept
    cdef str settle(self, int role)
    cdef bint _goes_with_param(self, int role) noexcept
    cdef int commit(self, owner) except -1
    cdef int _own(self, owner) except -1
    cdef int note_stream(self, uintptr_t stream) except -1
    cdef OnDevice *put_on_device(self) except NULL
    cdef void abandon(self) noexcept
    cdef void _give_back(self, Py_ssize_t keep) noexcept
    cdef bint _was_checked(self) noexcept
    cdef int _take(self, int role, object array) except -1
    cdef str _fault(self, int role)
    cdef str _mismatch(self, int role)
    cdef str _name(self, int role, Py_ssize_t row)
