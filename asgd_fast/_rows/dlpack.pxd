# The DLPack structures, as its C header defines them (dlpack.h 1.3; unchanged within major
# version 1), and the two functions that borrow an array through them.
# Source: https://dmlc.github.io/dlpack/latest/c_api.html

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

cdef enum:  # DLDeviceType
    kDLCPU = 1
    kDLCUDA = 2
    kDLCUDAHost = 3      # which the CPU too may read and write
    kDLROCMHost = 11     # likewise
    kDLCUDAManaged = 13

cdef enum:  # DLDataTypeCode
    kDLInt = 0
    kDLUInt = 1
    kDLFloat = 2
    kDLOpaqueHandle = 3
    kDLBfloat = 4
    kDLComplex = 5
    kDLBool = 6

cdef enum:
    DLPACK_MAJOR_VERSION = 1
    DLPACK_MINOR_VERSION = 3
    DLPACK_FLAG_BITMASK_READ_ONLY = 1
    DLPACK_FLAG_BITMASK_IS_COPIED = 2

cdef struct DLPackVersion:
    uint32_t major
    uint32_t minor

cdef struct DLDevice:
    int32_t device_type
    int32_t device_id

cdef struct DLDataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes

cdef struct DLTensor:
    void *data
    DLDevice device
    int32_t ndim
    DLDataType dtype
    int64_t *shape
    int64_t *strides  # in elements; NULL: C-contiguous
    uint64_t byte_offset

cdef struct DLManagedTensor:
    DLTensor dl_tensor
    void *manager_ctx
    void (*deleter)(DLManagedTensor *) noexcept

cdef struct DLManagedTensorVersioned:
    DLPackVersion version
    void *manager_ctx
    void (*deleter)(DLManagedTensorVersioned *) noexcept
    uint64_t flags
    DLTensor dl_tensor

cdef struct DLPackExchangeAPIHeader:
    DLPackVersion version
    DLPackExchangeAPIHeader *prev_api

cdef struct DLPackExchangeAPI:
    DLPackExchangeAPIHeader header
    void *managed_tensor_allocator
    int (*managed_tensor_from_py_object_no_sync)(
        void *py_object, DLManagedTensorVersioned **out) noexcept
    int (*managed_tensor_to_py_object_no_sync)(
        DLManagedTensorVersioned *tensor, void **out_py_object) noexcept
    int (*dltensor_from_py_object_no_sync)(void *py_object, DLTensor *out) noexcept
    int (*current_work_stream)(
        int32_t device_type, int32_t device_id, void **out_stream) noexcept


# A borrowed array: what it says of itself, and what must be given back. At most one of the two
# managed tensors is set; neither is when the exchange API lent a view that the object itself keeps
# alive.
cdef struct Borrowed:
    DLTensor tensor
    DLManagedTensorVersioned *versioned
    DLManagedTensor *legacy
    uintptr_t stream         # of memory of a GPU: as `stream_of`

# Fills `out` with the memory of `array`, for reading, or for writing too. The caller holds
# a reference to `array` for as long as it uses the memory, then calls give_back once. `streams` has
# the stream of each GPU, by its number, which a library lets wait for its own work if it does not
# say where that is done; None: the legacy one of each.
cdef int borrow(object array, bint writing, Borrowed *out, dict streams) except -1
cdef void give_back(Borrowed *borrowed) noexcept
cdef bint is_array(object candidate)

# For an array that is only read: what can be borrowed in its place where it cannot be itself, since
# it is a scalar of NumPy, or its strides are no multiples of its elements.
cdef object lendable(object array)

# The default stream of a GPU, whatever else the driver is told to take for it.
cdef enum:
    LEGACY_STREAM = 1

# The stream of a GPU on which the library of `array` works at the moment, for this thread; 0 if it
# does not say.
cdef uintptr_t stream_of(object array, int32_t device_id) except? 0

# The exchange API of a type, or NULL; it checks nothing of what `borrow` checks.
cdef DLPackExchangeAPI *exchange_api_of(cls) except? NULL
