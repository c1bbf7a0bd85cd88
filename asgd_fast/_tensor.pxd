# What a DLTensor says of its array.

from libc.stdint cimport int64_t

from asgd_fast._dlpack cimport DLDataType, DLTensor

cdef void *data_of(const DLTensor *tensor) noexcept
cdef int64_t size_of(const DLTensor *tensor) noexcept
cdef bint is_dense(const DLTensor *tensor) noexcept
cdef bint same_shape(const DLTensor *one, const DLTensor *other) noexcept
cdef bint same_layout(const DLTensor *one, const DLTensor *other) noexcept
cdef tuple shape_of(const DLTensor *tensor)
cdef tuple strides_of(const DLTensor *tensor)
cdef str dtype_name(DLDataType dtype)
cdef str device_name(const DLTensor *tensor)
