# The state of one param.

from asgd_fast._rows.rows cimport Mirror
from asgd_fast._schedule cimport Scalars
from asgd_fast.cuda.scalars cimport DeviceScalars

cdef class Record(dict):
    cdef Scalars now                 # while it is sealed; else as they were read last
    cdef double t0                   # of this param alone; nan: that of the group holds
    cdef readonly object param
    cdef public object source        # whose copy answers for the average while there is none
    cdef object _ax                  # while it is sealed
    cdef DeviceScalars device_scalars  # has the scalars instead, where a GPU does
    cdef readonly object average_dtype
    cdef readonly bint is_open
    cdef bint is_double              # whether the scalars are float64
    cdef readonly bint is_lazy       # whether there is no average before it begins
    cdef public bint has_average
    cdef bint is_shown               # whether anybody may have the average
    cdef bint is_in_step             # whether an engine may be about to advance `now`
    cdef bint is_behind              # whether its tensors are to be made those of `now` then

    cdef int leave_step(self) except -1
    cdef bint is_empty(self) noexcept
    cdef object average(self)
    cdef dict _with(self, scalars, ax)
    cdef int read(self, tuple scalars, Mirror *mirror) except -1
    cdef DeviceScalars scalars_on(self, int device)
