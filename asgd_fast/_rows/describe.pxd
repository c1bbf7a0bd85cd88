# What a DLTensor says of its array.

from libc.stdint cimport int32_t, int64_t

from asgd_fast._rows.dlpack cimport DLDataType, DLTensor

cdef inline void *data_of(const DLTensor *tensor) noexcept:
    return <char *>tensor.data + tensor.byte_offset


cdef inline bint same_form(const DLTensor *one, const DLTensor *other) noexcept:
    """Whether all but the memory and the dtype is the same, number by number."""
    cdef int32_t axis
    if (
        one.ndim != other.ndim
        or one.device.device_type != other.device.device_type
        or one.device.device_id != other.device.device_id
        or (one.strides == NULL) != (other.strides == NULL)
    ):
        return False
    for axis in range(one.ndim):
        if one.shape[axis] != other.shape[axis]:
            return False
        if one.strides != NULL and one.strides[axis] != other.strides[axis]:
            return False
    return True


cdef inline bint same_dtype(const DLTensor *one, const DLTensor *other) noexcept:
    return (
        one.dtype.code == other.dtype.code
        and one.dtype.bits == other.dtype.bits
        and one.dtype.lanes == other.dtype.lanes
    )


cdef int64_t n_elements(const DLTensor *tensor) noexcept
cdef bint is_dense(const DLTensor *tensor) noexcept
cdef bint same_shape(const DLTensor *one, const DLTensor *other) noexcept
cdef bint same_layout(const DLTensor *one, const DLTensor *other) noexcept
cdef tuple shape_of(const DLTensor *tensor)
cdef tuple strides_of(const DLTensor *tensor)
cdef str dtype_name(DLDataType dtype)
cdef str device_name(const DLTensor *tensor)

# Copies an array of the CPU into the layout of another dense one of its shape and dtype. Returns
# what keeps the copy alive, whose address goes into `data`.
cdef object copy_like(const DLTensor *tensor, const DLTensor *like, const void **data)
