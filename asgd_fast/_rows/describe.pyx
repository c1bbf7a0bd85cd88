"""What a DLTensor says of its array: where, how large and in which order, and the words for it.

This module reads descriptions, and memory as they say; it borrows nothing and refuses nothing.
"""

cimport numpy as np
from libc.stdint cimport int32_t, int64_t

from asgd_fast._rows.dlpack cimport (
    DLDataType,
    DLTensor,
    kDLBfloat,
    kDLBool,
    kDLComplex,
    kDLCPU,
    kDLCUDAHost,
    kDLFloat,
    kDLInt,
    kDLROCMHost,
    kDLUInt,
)

np.import_array()

cdef dict _DTYPES = {
    kDLInt: "int", kDLUInt: "uint", kDLFloat: "float", kDLBfloat: "bfloat", kDLComplex: "complex",
}
cdef dict _DEVICES = {
    kDLCPU: "cpu", 2: "cuda", kDLCUDAHost: "cuda_host", 4: "opencl", 7: "vulkan", 8: "metal",
    9: "vpi", 10: "rocm", kDLROCMHost: "rocm_host", 13: "cuda_managed", 14: "oneapi", 15: "webgpu",
    16: "hexagon", 17: "maia", 18: "trn",
}


cdef int64_t n_elements(const DLTensor *tensor) noexcept:
    cdef int64_t n = 1
    cdef int32_t axis
    for axis in range(tensor.ndim):
        n *= tensor.shape[axis]
    return n


cdef bint is_dense(const DLTensor *tensor) noexcept:
    """Whether the elements fill one block of memory, each once, in some order of the axes."""
    cdef int64_t n = n_elements(tensor), filled = 1
    cdef int32_t axis, _step
    if n <= 1 or _is_c_contiguous(tensor):
        return True
    # From the innermost axis outward, the next stride must be the size of what is filled so far.
    for _step in range(tensor.ndim):
        for axis in range(tensor.ndim):
            if tensor.shape[axis] > 1 and tensor.strides[axis] == filled:
                filled *= tensor.shape[axis]
                break
        else:
            break
    return filled == n


cdef bint _is_c_contiguous(const DLTensor *tensor) noexcept:
    cdef int64_t filled = 1
    cdef int32_t axis
    if tensor.strides == NULL:
        return True
    for axis in range(tensor.ndim - 1, -1, -1):
        if tensor.shape[axis] != 1:
            if tensor.strides[axis] != filled:
                return False
            filled *= tensor.shape[axis]
    return True


cdef bint same_shape(const DLTensor *one, const DLTensor *other) noexcept:
    cdef int32_t axis
    if one.ndim != other.ndim:
        return False
    for axis in range(one.ndim):
        if one.shape[axis] != other.shape[axis]:
            return False
    return True


cdef bint same_layout(const DLTensor *one, const DLTensor *other) noexcept:
    """Whether two dense arrays of one shape hold the same element at each offset."""
    cdef int32_t axis
    if n_elements(one) <= 1 or (_is_c_contiguous(one) and _is_c_contiguous(other)):
        return True
    if one.strides == NULL or other.strides == NULL:
        return False
    for axis in range(one.ndim):
        if one.shape[axis] != 1 and one.strides[axis] != other.strides[axis]:
            return False
    return True


cdef tuple shape_of(const DLTensor *tensor):
    return tuple([tensor.shape[axis] for axis in range(tensor.ndim)])


cdef tuple strides_of(const DLTensor *tensor):
    """The strides in elements, those that a NULL stands for included."""
    cdef int64_t stride = 1
    cdef int32_t axis
    if tensor.strides != NULL:
        return tuple([tensor.strides[axis] for axis in range(tensor.ndim)])
    strides = []
    for axis in range(tensor.ndim - 1, -1, -1):
        strides.insert(0, stride)
        stride *= tensor.shape[axis]
    return tuple(strides)


cdef str dtype_name(DLDataType dtype):
    if dtype.code == kDLBool:
        name = "bool"
    else:
        name = f"{_DTYPES.get(dtype.code, f'type code {dtype.code} of bits ')}{dtype.bits}"
    return name if dtype.lanes == 1 else f"{name}x{dtype.lanes}"


cdef str device_name(const DLTensor *tensor):
    kind = tensor.device.device_type
    return f"{_DEVICES.get(kind, f'type {kind}')}:{tensor.device.device_id}"


cdef object copy_like(const DLTensor *tensor, const DLTensor *like, const void **data):
    cdef np.npy_intp n = n_elements(tensor)
    # Only bits are moved, so that numbers of any kind will do.
    cdef int kind = (
        np.NPY_UINT16 if tensor.dtype.bits == 16 else np.NPY_UINT32 if tensor.dtype.bits == 32 else
        np.NPY_UINT64 if tensor.dtype.bits == 64 else np.NPY_COMPLEX128)
    cdef np.ndarray copy = np.PyArray_EMPTY(1, &n, kind, False)
    data[0] = np.PyArray_DATA(copy)
    np.PyArray_CopyInto(
        _view(like, np.PyArray_DATA(copy), kind), _view(tensor, data_of(tensor), kind))
    return copy


cdef np.ndarray _view(const DLTensor *tensor, void *data, int kind):
    """The memory at `data` as a NumPy array in the layout of a tensor."""
    cdef np.ndarray view = np.PyArray_SimpleNewFromData(
        tensor.ndim, <np.npy_intp *>tensor.shape, kind, data)
    cdef int32_t axis
    if tensor.strides != NULL:
        for axis in range(tensor.ndim):
            np.PyArray_STRIDES(view)[axis] = tensor.strides[axis] * np.PyArray_ITEMSIZE(view)
        np.PyArray_UpdateFlags(view, np.NPY_ARRAY_UPDATE_ALL)
    return view
