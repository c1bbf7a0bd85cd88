"""Fake DLPack exporters: each lends the memory of a NumPy array in one of the ways there are.

They know the C structures and count what happens to them; they do not know who borrows.
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, PYFUNCTYPE, Structure, c_char_p, c_int, c_void_p, py_object

READ_ONLY, IS_COPIED = 1, 2  # the flags of a versioned tensor
CPU, CUDA, CUDA_HOST, METAL = 1, 2, 3, 8  # DLDeviceType
_TYPE_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}


class DLPackVersion(Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32)]


class DLDevice(Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class DLDataType(Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class DLTensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", DLDataType),
        ("shape", POINTER(ctypes.c_int64)),
        ("strides", POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class DLManagedTensor(Structure):
    _fields_ = [("dl_tensor", DLTensor), ("manager_ctx", c_void_p), ("deleter", c_void_p)]


class DLManagedTensorVersioned(Structure):
    _fields_ = [
        ("version", DLPackVersion),
        ("manager_ctx", c_void_p),
        ("deleter", c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", DLTensor),
    ]


class DLPackExchangeAPI(Structure):
    _fields_ = [
        ("version", DLPackVersion),
        ("prev_api", c_void_p),
        ("managed_tensor_allocator", c_void_p),
        ("managed_tensor_from_py_object_no_sync", c_void_p),
        ("managed_tensor_to_py_object_no_sync", c_void_p),
        ("dltensor_from_py_object_no_sync", c_void_p),
        ("current_work_stream", c_void_p),
    ]


# Prototypes of our own: the attributes of ctypes.pythonapi are shared by the whole process.
_capsule_new = PYFUNCTYPE(py_object, c_void_p, c_char_p, c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_pointer_of = PYFUNCTYPE(c_void_p, c_void_p, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_name_of = PYFUNCTYPE(c_char_p, c_void_p)(("PyCapsule_GetName", ctypes.pythonapi))


_pointed_to = []  # by capsules, which keep nothing alive


def _new_capsule(pointer, name, destructor=None):
    _pointed_to.append(name)
    return _capsule_new(pointer, name, destructor and _address(destructor))


def name_of(capsule):
    return _name_of(id(capsule))


def _address(function):
    return ctypes.cast(function, c_void_p).value


# By address, and for good: a deleter that is called once too often is counted and does not crash.
_loans = {}


class Loan:
    """One managed tensor, and how often it was given back."""

    def __init__(self, array, managed, *buffers):
        self.array, self.managed, self.buffers = array, managed, buffers
        self.address = ctypes.addressof(managed)
        self.n_deleted = 0
        self.left_with = None  # what the memory held when it was given back
        _loans[self.address] = self


@CFUNCTYPE(None, c_void_p)
def _delete(address):
    loan = _loans[address]
    loan.n_deleted += 1
    loan.left_with = loan.array.copy()
    for buffer in loan.buffers:  # the shape and strides are the borrower's no more
        ctypes.memset(buffer, 0xFF, ctypes.sizeof(buffer))


@CFUNCTYPE(None, c_void_p)
def _destroy(capsule):
    """Free a tensor that nobody consumed: the destructor of every capsule here."""
    name = _name_of(capsule)
    if not name.startswith(b"used_"):
        _delete(_pointer_of(capsule, name))


class Exporter:
    """An array of no library: what its subclasses lend, with one thing or another misstated.

    Parameters
    ----------
    array : numpy.ndarray
        Owns the memory.
    version, flags, device_type, device_id, lanes : optional
        What is said of it.
    ndim : int, optional
    shape : tuple of int or None, optional
        None: NULL.
    data : int, optional
        Its address, if another is to be said.
    byte_offset : int
        How far its data pointer is before its first element.
    strides : bool
        Whether strides are said.
    deleter : bool
        Whether its tensors have one.
    name : bytes, optional
        The name of its capsules, if another.
    error : BaseException or type, optional
        What it raises instead of lending.
    """

    def __init__(
        self,
        array,
        *,
        version=(1, 3),
        flags=0,
        device_type=CPU,
        device_id=0,
        lanes=1,
        ndim=None,
        shape=...,
        data=...,
        byte_offset=0,
        strides=True,
        deleter=True,
        name=None,
        error=None,
    ):
        self.array = array
        self.version, self.flags, self.lanes = version, flags, lanes
        self.device_type, self.device_id = device_type, device_id
        self.ndim = array.ndim if ndim is None else ndim
        self.shape = array.shape if shape is ... else shape
        self.data = array.ctypes.data - byte_offset if data is ... else data
        self.byte_offset, self.strides, self.deleter = byte_offset, strides, deleter
        self.name, self.error = name, error
        self.asked = []  # in which ways
        self.loans = []
        self.capsules = []

    def __bool__(self):
        # How _FAIL, a C function without a body of its own, comes to set an error.
        raise self.error

    @property
    def n_deleted(self):
        return [loan.n_deleted for loan in self.loans]

    def fill(self, tensor):
        array = self.array
        said = self.shape or ()
        shape = (ctypes.c_int64 * len(said))(*said)
        strides = (ctypes.c_int64 * array.ndim)(
            *(stride // array.itemsize for stride in array.strides)
        )
        tensor.data = self.data
        tensor.device = DLDevice(self.device_type, self.device_id)
        tensor.ndim = self.ndim
        bits = 8 * array.itemsize
        tensor.dtype = DLDataType(_TYPE_CODES[array.dtype.kind], bits, self.lanes)
        # An array without axes may say NULL of both.
        tensor.shape = shape if said else None
        tensor.strides = strides if array.ndim and self.strides else None
        tensor.byte_offset = self.byte_offset
        return shape, strides

    def lend(self, managed):
        """Fill a managed tensor of either kind."""
        if isinstance(managed, DLManagedTensorVersioned):
            managed.version = self.version
            managed.flags = self.flags
        managed.deleter = _address(_delete) if self.deleter else None
        self.loans.append(Loan(self.array, managed, *self.fill(managed.dl_tensor)))
        return self.loans[-1]

    def capsule(self, kind, name):
        if self.error is not None:
            raise self.error
        self.capsules.append(_new_capsule(self.lend(kind()).address, self.name or name, _destroy))
        return self.capsules[-1]


class Immutable(Exporter):
    """Lends legacy capsules, has no in-place operators, and never heard of max_version."""

    def __dlpack__(self, *, stream=None):
        self.asked.append("no version")
        return self.capsule(DLManagedTensor, b"dltensor")


class Legacy(Immutable):
    def __iadd__(self, other):
        return NotImplemented


class IgnoresVersion(Legacy):
    def __dlpack__(self, *, stream=None, max_version=None):
        self.asked.append(max_version or "no version")
        return self.capsule(DLManagedTensor, b"dltensor")


class Versioned(Exporter):
    def __dlpack__(self, *, stream=None, max_version=None):
        self.asked.append(max_version or "no version")
        return self.capsule(DLManagedTensorVersioned, b"dltensor_versioned")


@CFUNCTYPE(c_int, py_object, POINTER(c_void_p))
def _managed_tensor(array, out):
    array.asked.append("managed tensor")
    out[0] = array.lend(DLManagedTensorVersioned()).address
    return 0


@CFUNCTYPE(c_int, py_object, POINTER(DLTensor))
def _plain_tensor(array, out):
    array.asked.append("plain tensor")
    array.buffers = array.fill(out[0])  # the array itself keeps them
    return 0


@CFUNCTYPE(c_int, py_object, c_void_p)
def _fail_without_a_reason(array, out):
    return -1


# ctypes cannot return with an error set. This function of one argument can, through __bool__, and
# no C calling convention minds the second.
_FAIL = ctypes.pythonapi.PyObject_IsTrue


def exchange_api(*versions, plain=True, fails=None, stream_of=None, name=b"dlpack_exchange_api"):
    """Make a capsule for ``__dlpack_c_exchange_api__``.

    Parameters
    ----------
    versions : (int, int)
        Of the API and, if more than one, of its prev_api and so on. Those of another major version
        than 1 fail when they are used.
    plain : bool
        Whether it lends tensors that are not managed.
    fails : {None, "with a reason", "without a reason"}
    stream_of : callable, optional
        Of a device's number: its current stream, an integer.
    name : bytes
    """

    @CFUNCTYPE(c_int, ctypes.c_int32, ctypes.c_int32, POINTER(c_void_p))
    def current_work_stream(device_type, device, out):
        assert device_type == CUDA
        out[0] = stream_of(device)
        return 0

    _pointed_to.append(current_work_stream)
    failures = {"with a reason": _FAIL, "without a reason": _fail_without_a_reason}
    previous = None
    for major, minor in reversed(versions):
        managed_tensor, plain_tensor = _managed_tensor, _plain_tensor
        if fails or major != 1:
            managed_tensor = plain_tensor = failures[fails or "without a reason"]
        _pointed_to.append(
            DLPackExchangeAPI(
                version=DLPackVersion(major, minor),
                prev_api=previous,
                managed_tensor_from_py_object_no_sync=_address(managed_tensor),
                dltensor_from_py_object_no_sync=_address(plain_tensor) if plain else None,
                current_work_stream=_address(current_work_stream) if stream_of else None,
            )
        )
        previous = ctypes.addressof(_pointed_to[-1])
    return _new_capsule(previous, name)


class Exchange(Versioned):
    __dlpack_c_exchange_api__ = exchange_api((1, 3))


class ExchangeManagedOnly(Exporter):
    """Has no __dlpack__ either: the exchange API must do."""

    __dlpack_c_exchange_api__ = exchange_api((1, 3), plain=False)


class ExchangeChained(Versioned):
    __dlpack_c_exchange_api__ = exchange_api((2, 5), (2, 0), (1, 2))


class ExchangeNewerOnly(Versioned):
    __dlpack_c_exchange_api__ = exchange_api((2, 5), (2, 0))


class ExchangeFails(Versioned):
    __dlpack_c_exchange_api__ = exchange_api((1, 3), fails="with a reason")


class ExchangeFailsSilently(Versioned):
    __dlpack_c_exchange_api__ = exchange_api((1, 3), fails="without a reason")


def forgetful(kind):
    """Make a kind that does not keep its capsules: they die with the borrower's reference."""

    class Forgetful(kind):
        def capsule(self, *options):
            super().capsule(*options)
            return self.capsules.pop()

    return Forgetful


# The kinds that can say what may be written, all that lend what may, and those that take an error.
VERSIONED_KINDS = [Versioned, Exchange, ExchangeManagedOnly, ExchangeChained, ExchangeNewerOnly]
KINDS = [Legacy, IgnoresVersion, *VERSIONED_KINDS]
FAILING_KINDS = [Legacy, Versioned, ExchangeFails]


def assert_given_back(arrays):
    """Assert that every tensor was given back once, and every capsule consumed."""
    for array in arrays:
        assert array.n_deleted == [1] * len(array.loans)
        assert all(name_of(capsule).startswith(b"used_dltensor") for capsule in array.capsules)
        array.capsules.clear()
        assert array.n_deleted == [1] * len(array.loans), "freed by the capsule too"
