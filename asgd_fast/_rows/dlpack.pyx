"""Arrays in: the memory of any DLPack exporter, without a copy.

This module knows how arrays are lent and given back; it does not know what they are for.

An exporter is asked, in this order, through its type's C exchange API (DLPack 1.2; no Python
object is made), a versioned capsule (DLPack 1.0), a legacy capsule. The exchange API and the legacy
capsule say nothing of read-only memory, autograd or lazily negated values, so these are checked
here, on every path. NumPy's arrays are read through its own C interface where they are plain, which
takes a hundredth of the time of a capsule. Arrays of Numba's devices do not speak DLPack; they are
read through ``__cuda_array_interface__``.
"""

import sys

cimport numpy as np
from cpython.exc cimport PyErr_Occurred
from cpython.object cimport PyObject, PyTypeObject, descrgetfunc
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_SetName
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.stdlib cimport free, malloc

np.import_array()

# More than any memory holds: as 16-byte numbers they fill an address space of 56 bits.
cdef double MOST_ELEMENTS = 2.0 ** 52

# Libraries whose arrays are values although they have in-place operators, which bind a name to a
# new array. Other arrays may share the memory, and expressions that read it may be pending.
cdef frozenset OF_VALUES = frozenset({"drjit", "mlx"})


cdef class _Exporter:
    """How the arrays of one type are lent: what can be learnt from the type alone."""

    cdef object cls
    cdef DLPackExchangeAPI *api
    cdef bint has_dlpack      # has a __dlpack__ method
    cdef bint has_device      # has a __dlpack_device__ method
    cdef bint has_interface   # has a __cuda_array_interface__ attribute, and nothing better
    cdef bint takes_version   # its __dlpack__ takes max_version
    cdef bint has_autograd    # its instances have .requires_grad (torch)
    cdef bint has_lazy_sign   # its instances have .is_neg() and .is_conj() (torch)
    cdef bint in_place        # has in-place operators (JAX's arrays don't, as they never change)
    cdef bint is_value        # of a library among OF_VALUES
    cdef bint has_mask        # NumPy's arrays with a mask
    cdef bint is_numpy        # exactly NumPy's own
    cdef object _requires_grad
    cdef descrgetfunc _get_requires_grad

    def __cinit__(self, cls):
        self.cls = cls
        self.api = exchange_api_of(cls)
        self.has_dlpack = hasattr(cls, "__dlpack__")
        self.has_device = hasattr(cls, "__dlpack_device__")
        self.has_interface = (
            self.api == NULL and not self.has_dlpack and hasattr(cls, "__cuda_array_interface__"))
        self.takes_version = True
        self.has_autograd = hasattr(cls, "requires_grad")
        self.has_lazy_sign = hasattr(cls, "is_neg")
        self.in_place = getattr(cls, "__iadd__", None) is not None
        self.is_value = not OF_VALUES.isdisjoint(
            [str(base.__module__).partition(".")[0] for base in cls.__mro__])
        self.has_mask = issubclass(cls, np.ndarray) and hasattr(cls, "mask")
        self.is_numpy = cls is np.ndarray
        if self.has_autograd:
            self._requires_grad = cls.requires_grad
            kind = type(self._requires_grad)
            self._get_requires_grad = (<PyTypeObject *>kind).tp_descr_get

    cdef bint lends(self) noexcept:
        return self.api != NULL or self.has_dlpack or self.has_interface

    cdef bint requires_grad(self, object array) except -1:
        """The same as array.requires_grad, in fewer steps where it is a descriptor."""
        if self._get_requires_grad == NULL:
            return array.requires_grad
        return self._get_requires_grad(self._requires_grad, array, type(array))


# One small entry for each type of array. The DLPack specification lets consumers keep the exchange
# API of a type.
cdef dict _exporters = {}

# That of the array before, as most arrays that come together are of one type.
cdef _Exporter _last = _Exporter(np.ndarray)


cdef _Exporter _exporter_of(object array):
    global _last
    cls = type(array)
    if _last.cls is cls:
        return _last
    cdef object found = _exporters.get(cls)
    if found is None:
        found = _Exporter(cls)
        if not (<_Exporter>found).lends():
            return <_Exporter>found
        _exporters[cls] = found
    _last = <_Exporter>found
    return _last


cdef DLPackExchangeAPI *exchange_api_of(cls) except? NULL:
    """The exchange API of a type in a version this module can read, or NULL."""
    capsule = getattr(cls, "__dlpack_c_exchange_api__", None)
    if not PyCapsule_IsValid(capsule, b"dlpack_exchange_api"):
        return NULL
    cdef DLPackExchangeAPI *api = <DLPackExchangeAPI *>PyCapsule_GetPointer(
        capsule, b"dlpack_exchange_api")
    while api != NULL and api.header.version.major != DLPACK_MAJOR_VERSION:
        api = <DLPackExchangeAPI *>api.header.prev_api
    return api


cdef bint is_array(object candidate):
    # Most that are none are these, and to look for what they lack takes a microsecond.
    if candidate is None or type(candidate) is list or type(candidate) is tuple:
        return False
    return _exporter_of(candidate).lends()


cdef int borrow(
    object array, bint writing, Borrowed *out, dict streams,
) except -1:
    """Lend the memory of `array`; on an error nothing stays lent.

    Raises TypeError for what is no array, BufferError for memory that may not be written, and
    ValueError for an array whose memory does not hold its values or that its library will not lend.
    """
    cdef _Exporter exporter = _exporter_of(array)
    out.versioned = NULL
    out.legacy = NULL
    if not exporter.lends():
        raise TypeError(
            f"{type(array).__name__} is not an array; "
            "expected an array of a library that speaks DLPack, such as NumPy, torch or CuPy")
    if exporter.is_numpy and _borrow_from_numpy(array, writing, &out.tensor):
        return 0
    if exporter.has_autograd and exporter.requires_grad(array):
        raise BufferError(
            "it requires grad, and autograd does not see this update; pass its detach(), "
            "which shares the memory")
    if exporter.has_mask:
        raise TypeError(
            f"{type(array).__name__} has a mask, which this update does not see; pass its data, "
            "which shares the memory, or its filled(0)")
    if exporter.has_interface:
        _require_driver()
    capsule = None
    is_read_only = False
    try:
        try:
            if exporter.api != NULL:
                _borrow_from_exchange_api(exporter, array, writing, out)
            elif exporter.has_interface:
                is_read_only = _borrow_from_interface(array.__cuda_array_interface__, out)
            else:
                capsule = _capsule_of(exporter, array, streams, out)
                _borrow_from_capsule(capsule, out)
        except MemoryError:
            raise
        except Exception as error:
            # The first line: torch adds a C++ backtrace, which the chained error keeps.
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{type(array).__name__} did not lend its memory through DLPack: {reason}"
            ) from error
        _check_description(&out.tensor)
        if exporter.has_lazy_sign and array.is_neg():
            raise ValueError(
                "its memory holds the values before a pending negation; pass its resolve_neg()")
        if out.tensor.dtype.code == kDLComplex and exporter.has_lazy_sign and array.is_conj():
            raise ValueError(
                "its memory holds the values before a pending conjugation; pass its resolve_conj()")
        if writing and is_read_only:
            raise BufferError("it is read-only; expected an array that may be written")
        if writing and not exporter.has_interface:
            _check_writable(exporter, array, out)
    except BaseException:
        # The deleter and the capsule's destructor may run Python code, so no exception may be
        # pending: here it is put aside, as it is not when the function returns.
        give_back(out)
        capsule = None
        raise
    return 0


cdef void give_back(Borrowed *borrowed) noexcept:
    """Call the deleter of a managed tensor, once; a second call does nothing."""
    cdef DLManagedTensorVersioned *versioned = borrowed.versioned
    cdef DLManagedTensor *legacy = borrowed.legacy
    borrowed.versioned = NULL
    borrowed.legacy = NULL
    if versioned != NULL and versioned.deleter != NULL:
        versioned.deleter(versioned)
    if legacy != NULL and legacy.deleter != NULL:
        legacy.deleter(legacy)


cdef bint _borrow_from_numpy(np.ndarray array, bint writing, DLTensor *out) noexcept:
    """Describe a plain array: False for what is left to its capsule, in which NumPy says why."""
    if not (
        np.PyArray_ISCARRAY_RO(array)  # C-contiguous, aligned, in this machine's byte order
        and (np.PyArray_ISWRITEABLE(array) or not writing)
        and sizeof(np.npy_intp) == sizeof(int64_t)
    ):
        return False
    out.dtype.lanes = 1
    out.dtype.code = kDLFloat
    kind = np.PyArray_TYPE(array)
    if kind == np.NPY_FLOAT32:
        out.dtype.bits = 32
    elif kind == np.NPY_FLOAT64:
        out.dtype.bits = 64
    elif kind == np.NPY_FLOAT16:
        out.dtype.bits = 16
    else:
        return False
    out.data = np.PyArray_DATA(array)
    out.byte_offset = 0
    out.device.device_type = kDLCPU
    out.device.device_id = 0
    out.ndim = np.PyArray_NDIM(array)
    out.shape = <int64_t *>np.PyArray_DIMS(array)
    out.strides = NULL
    return True


cdef object lendable(object array):
    if isinstance(array, np.generic):
        return np.PyArray_FROM_O(array)
    if isinstance(array, np.ndarray) and not np.PyArray_ISCARRAY_RO(array) and any(
            [stride % max(array.itemsize, 1) for stride in array.strides]):
        return array.copy()
    return array


cdef int _borrow_from_exchange_api(
    _Exporter exporter, object array, bint writing, Borrowed *out,
) except -1:
    # Only a managed tensor carries the read-only flag, which torch does not have; the plain one is
    # quicker. In torch, neither keeps memory that another thread replaces meanwhile (tensor.data =
    # other).
    cdef DLPackExchangeAPI *api = exporter.api
    if api.dltensor_from_py_object_no_sync != NULL and (not writing or exporter.has_autograd):
        if api.dltensor_from_py_object_no_sync(<PyObject *>array, &out.tensor) != 0:
            _raise_pending()
    else:
        if api.managed_tensor_from_py_object_no_sync(<PyObject *>array, &out.versioned) != 0:
            out.versioned = NULL
            _raise_pending()
        _read_versioned(out)
    if out.tensor.device.device_type in (kDLCUDA, kDLCUDAManaged):
        out.stream = stream_of(array, out.tensor.device.device_id)
    return 0


cdef int _require_driver() except -1:
    """Say what is missing for arrays of CUDA devices, whatever else is wrong with this one."""
    try:
        from asgd_fast.cuda.device import driver
    except ImportError as error:
        from asgd_fast.cuda import MISSING

        raise ImportError(MISSING) from error
    driver()
    return 0


cdef bint _borrow_from_interface(dict interface, Borrowed *out) except -1:
    """Describe an array as the dict does, version 3 of the interface; whether it is read-only.

    Source: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
    """
    from asgd_fast.cuda.device import number_of

    cdef object dtype = np.dtype(interface["typestr"])
    cdef tuple shape = interface["shape"]
    cdef tuple strides = interface.get("strides") or ()
    cdef int i, n = len(shape)
    address, is_read_only = interface["data"]
    if interface.get("mask") is not None:
        raise BufferError("it has a mask")
    if not dtype.isnative:
        raise BufferError(f"its dtype {dtype.str} has the bytes of another machine's order")
    device = number_of(address)
    cdef DLManagedTensor *managed = <DLManagedTensor *>malloc(
        sizeof(DLManagedTensor) + 2 * n * sizeof(int64_t))
    if managed == NULL:
        raise MemoryError
    cdef DLTensor *tensor = &managed.dl_tensor
    managed.manager_ctx = NULL
    managed.deleter = _free
    out.legacy = managed
    tensor.data = <void *><uintptr_t>address
    tensor.device.device_type = kDLCUDA
    tensor.device.device_id = device
    tensor.ndim = n
    tensor.dtype.code = _CODES.get(dtype.kind, kDLOpaqueHandle)
    tensor.dtype.bits = 8 * dtype.itemsize
    tensor.dtype.lanes = 1
    tensor.byte_offset = 0
    tensor.shape = <int64_t *>(managed + 1)
    tensor.strides = tensor.shape + n if strides else NULL
    for i in range(n):
        tensor.shape[i] = shape[i]
        if strides:
            if strides[i] % dtype.itemsize:
                raise BufferError(
                    f"its strides {strides} are no multiples of its {dtype.itemsize}-byte elements")
            tensor.strides[i] = strides[i] // dtype.itemsize
    out.tensor = tensor[0]
    out.stream = interface.get("stream") or LEGACY_STREAM
    return is_read_only


cdef dict _CODES = {
    "f": kDLFloat, "c": kDLComplex, "i": kDLInt, "u": kDLUInt, "b": kDLBool,
}


cdef void _free(DLManagedTensor *managed) noexcept:
    free(managed)


cdef int _borrow_from_capsule(object capsule, Borrowed *out) except -1:
    if PyCapsule_IsValid(capsule, b"dltensor_versioned"):
        out.versioned = <DLManagedTensorVersioned *>PyCapsule_GetPointer(
            capsule, b"dltensor_versioned")
        # Renamed, the capsule is consumed: its own destructor leaves the tensor to us.
        PyCapsule_SetName(capsule, b"used_dltensor_versioned")
        _read_versioned(out)
    elif PyCapsule_IsValid(capsule, b"dltensor"):
        out.legacy = <DLManagedTensor *>PyCapsule_GetPointer(capsule, b"dltensor")
        PyCapsule_SetName(capsule, b"used_dltensor")
        out.tensor = out.legacy.dl_tensor
    else:
        raise TypeError(f"__dlpack__ returned {capsule!r}, no unused DLPack capsule")
    return 0


cdef object _capsule_of(_Exporter exporter, object array, dict streams, Borrowed *out):
    stream = {}
    kind, number = array.__dlpack_device__() if exporter.has_device else (kDLCPU, 0)
    if kind in (kDLCUDA, kDLCUDAManaged):
        out.stream = stream_of(array, number)
        if out.stream != 0:
            stream["stream"] = -1  # no wait: what works elsewhere is let wait for that stream
        else:
            stream["stream"] = (streams or {}).get(number, LEGACY_STREAM)
    if exporter.takes_version:
        try:
            return array.__dlpack__(
                max_version=(DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION), **stream)
        except TypeError:
            # Either an exporter older than DLPack 1.0, or a TypeError of its own: the call
            # below tells them apart.
            pass
    capsule = array.__dlpack__(**stream)
    exporter.takes_version = False
    return capsule


cdef uintptr_t stream_of(object array, int32_t device_id) except? 0:
    cdef _Exporter exporter = _exporter_of(array)
    cdef void *stream = NULL
    if exporter.api != NULL and exporter.api.current_work_stream != NULL:
        if exporter.api.current_work_stream(kDLCUDA, device_id, &stream) != 0:
            _raise_pending()
        return <uintptr_t>stream or LEGACY_STREAM
    library = type(array).__module__.partition(".")[0]
    if library == "torch":
        return sys.modules["torch"].cuda.current_stream(device_id).cuda_stream or LEGACY_STREAM
    if library == "cupy":
        return sys.modules["cupy"].cuda.get_current_stream(device_id).ptr or LEGACY_STREAM
    return 0


cdef int _raise_pending() except -1:
    """Raise the exception that a C exporter has set, or one that says it set none."""
    if PyErr_Occurred() == NULL:
        raise BufferError("the exchange API failed and gave no reason")
    return -1


cdef int _read_versioned(Borrowed *out) except -1:
    cdef DLPackVersion version = out.versioned.version
    # Only the fields up to the deleter keep their place in another major version.
    if version.major != DLPACK_MAJOR_VERSION:
        raise BufferError(
            f"its version is {version.major}.{version.minor}, expected {DLPACK_MAJOR_VERSION}.x")
    out.tensor = out.versioned.dl_tensor
    return 0


cdef int _check_writable(_Exporter exporter, object array, Borrowed *borrowed) except -1:
    # A legacy capsule cannot say that memory is read-only, but a type without in-place operators
    # says that its arrays never change.
    if exporter.is_value or (borrowed.legacy != NULL and not exporter.in_place):
        raise BufferError(
            f"{type(array).__name__} arrays never change; expected an array that may be written")
    if borrowed.versioned != NULL:
        if borrowed.versioned.flags & DLPACK_FLAG_BITMASK_READ_ONLY:
            raise BufferError("it is read-only; expected an array that may be written")
        if borrowed.versioned.flags & DLPACK_FLAG_BITMASK_IS_COPIED:
            raise BufferError(
                f"{type(array).__name__} lent a copy; expected its own memory, to be written")
    return 0


cdef int _check_description(const DLTensor *tensor) except -1:
    """Check that an array can be as large as it says; then sizes in bytes do not overflow."""
    cdef double n = 1  # of the axes that are not empty: some code multiplies these alone
    cdef int32_t axis
    if tensor.ndim < 0:
        raise ValueError(f"ndim {tensor.ndim} is impossible; expected ndim >= 0")
    if tensor.ndim > 0 and tensor.shape == NULL:
        raise ValueError(f"its shape is NULL; expected the sizes of its {tensor.ndim} axes")
    for axis in range(tensor.ndim):
        n *= max(tensor.shape[axis], <int64_t>1)
        if tensor.shape[axis] < 0 or n > MOST_ELEMENTS:
            shape = tuple([tensor.shape[axis] for axis in range(tensor.ndim)])
            raise ValueError(
                f"shape {shape} is impossible; expected sizes >= 0 of an array that memory holds")
    return 0


def path_of(array):
    """How the memory of `array` is borrowed: what ``python -m asgd_fast`` reports.

    Parameters
    ----------
    array : array
        Of any library; only its memory's description is looked at.

    Returns
    -------
    str
        "C interface", "exchange API 1.3", "versioned capsule 1.0", "legacy capsule" or "CUDA array
        interface".
    """
    cdef _Exporter exporter = _exporter_of(array)
    cdef Borrowed borrowed
    cdef DLPackVersion version
    if exporter.api != NULL:
        version = exporter.api.header.version
        return f"exchange API {version.major}.{version.minor}"
    if exporter.is_numpy:
        return "C interface"
    if exporter.has_interface:
        return "CUDA array interface"
    borrow(array, False, &borrowed, None)
    try:
        if borrowed.versioned == NULL:
            return "legacy capsule"
        version = borrowed.versioned.version
        return f"versioned capsule {version.major}.{version.minor}"
    finally:
        give_back(&borrowed)
