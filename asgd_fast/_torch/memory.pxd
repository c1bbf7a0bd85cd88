# The memory of torch's own tensors.

from asgd_fast._rows.dlpack cimport Borrowed

cpdef bint is_ordinary(object tensor)
cdef object number_as_tensor(double value, bint is_double)
cdef bint borrow_tensor(object tensor, bint writing, Borrowed *out, bint is_own=*) except -1
