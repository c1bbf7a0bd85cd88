"""The memory of torch's own tensors, which may require grad. This module knows no optimizer."""

from cpython.exc cimport PyErr_Clear
from cpython.object cimport PyObject

import torch

from asgd_fast._rows.dlpack cimport (
    Borrowed,
    DLPackExchangeAPI,
    borrow,
    exchange_api_of,
    kDLComplex,
)

cdef object TENSOR = torch.Tensor
cdef object PARAMETER = torch.nn.Parameter
cdef object _is_neg = torch.Tensor.is_neg
cdef DLPackExchangeAPI *_api = exchange_api_of(TENSOR)


cpdef bint is_ordinary(object tensor):
    """Whether its memory may be used: a subclass may mean anything."""
    return type(tensor) is TENSOR or type(tensor) is PARAMETER


cdef bint lend(object tensor, bint writing, Borrowed *out, bint is_own=False) except -1:
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
