# step, eta and mu of a param in the memory of a GPU.

from asgd_fast._schedule cimport Plan

# The scalars of a row that the GPU has in its memory, and advances.
cdef struct DeviceRow:
    void *scalars
    bint double_scalars  # rather than float
    void *ticket         # one 32-bit zero beside the scalars, where blocks count themselves
    Plan plan            # what they follow from
    const void *lr       # where the GPU has it, instead of the plan's; NULL: that holds
    bint double_lr

cdef class DeviceRows:
    cdef DeviceRow *rows
    cdef Py_ssize_t n_rows
    cdef list scalars  # a `DeviceScalars` for each row
    cdef public object loss_scale
    cdef public object found_inf

    cdef int add(self, const DeviceRow *row, scalars) except -1

cdef class DeviceScalars:
    cdef object _block
    cdef void *_address
    cdef readonly int device
    cdef readonly bint is_double
    cdef public double steps

    cdef int fill(
        self, DeviceRows rows, const Plan *plan, const void *lr, bint double_lr) except -1
