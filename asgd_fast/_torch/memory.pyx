"""The memory of torch's own tensors, which may require grad. This module knows no optimizer."""

from cpython.exc cimport PyErr_Clear
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdlib cimport free, malloc
from libc.string cimport memset

import torch

from asgd_fast._rows.dlpack cimport (
    DLPACK_MAJOR_VERSION,
    DLPACK_MINOR_VERSION,
    Borrowed,
    DLManagedTensorVersioned,
    DLPackExchangeAPI,
    borrow,
    exchange_api_of,
    kDLComplex,
    kDLCPU,
    kDLFloat,
)

cdef object TENSOR = torch.Tensor
cdef object PARAMETER = torch.nn.Parameter
cdef object _is_neg = torch.Tensor.is_neg
cdef DLPackExchangeAPI *_api = exchange_api_of(TENSOR)


cpdef bint is_ordinary(object tensor):
    """Whether its memory may be used: a subclass may mean anything."""
    return type(tensor) is TENSOR or type(tensor) is PARAMETER


cdef bint borrow_tensor(
    object tensor, bint writing, Borrowed *out, bint is_own=False,
) except -1:
    """Borrow an ordinary tensor. False if it has no memory, or holds values still to be negated.

    One that nobody else has is not asked for that, which takes 60 to 100 ns.
    """
    if _api != NULL:
        out.versioned = NULL
        out.legacy = NULL
        if _api.dltensor_from_py_object_no_sync(<PyObject *>tensor, &out.tensor) != 0:
            PyErr_Clear()
            return False
        # The exchange API says nothing of values that are still to be negated or conjugated.
        return is_own or not _is_neg(tensor) and not (
            out.tensor.dtype.code == kDLComplex and tensor.is_conj())
    try:
        borrow(tensor.detach(), writing, out, None)
    except (BufferError, TypeError, ValueError):
        return False
    return True


cdef void _free(DLManagedTensorVersioned *described) noexcept nogil:
    free(described)


cdef object number_as_tensor(double value, bint is_double):
    """A number as a tensor of no dimension of the host, in memory of its own; None if torch cannot.

    No mode of torch sees it, and it takes a quarter of the time of a ``scalar_tensor``.
    """
    if _api == NULL or _api.managed_tensor_to_py_object_no_sync == NULL:
        return None
    cdef DLManagedTensorVersioned *described = <DLManagedTensorVersioned *>malloc(
        sizeof(DLManagedTensorVersioned) + sizeof(double))  # the number comes after it
    if described == NULL:
        raise MemoryError
    memset(described, 0, sizeof(DLManagedTensorVersioned))
    described.version.major, described.version.minor = DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION
    described.deleter = _free
    described.dl_tensor.data = described + 1
    described.dl_tensor.device.device_type = kDLCPU
    described.dl_tensor.dtype.code = kDLFloat
    described.dl_tensor.dtype.bits = 64 if is_double else 32
    described.dl_tensor.dtype.lanes = 1
    if is_double:
        (<double *>described.dl_tensor.data)[0] = value
    else:
        (<float *>described.dl_tensor.data)[0] = <float>value
    cdef PyObject *made
    if _api.managed_tensor_to_py_object_no_sync(described, <void **>&made) != 0:
        PyErr_Clear()
        return None
    tensor = <object>made
    Py_DECREF(tensor)
    return tensor
