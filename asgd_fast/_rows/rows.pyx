"""The rows of one step: takes the arrays in and checks every one before the first byte is written.

This module knows what makes arrays fit for one in-place pass; it does not know how the pass is made
(the engines), nor what a sequence, a group or a schedule is (update and the faces above it).
"""

from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.math cimport isnan
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from asgd_fast._rows.dlpack cimport (
    Borrowed,
    DLDataType,
    DLDevice,
    DLTensor,
    Known,
    LEGACY_STREAM,
    borrow,
    forget,
    give_back,
    is_array as _is_array,
    kDLBfloat,
    kDLComplex,
    kDLCPU,
    kDLCUDA,
    kDLCUDAHost,
    kDLCUDAManaged,
    kDLFloat,
    kDLROCMHost,
)
from asgd_fast._schedule cimport Plan, Scalars, decay_of, scalars_after
from asgd_fast._rows.describe cimport (
    data_of,
    device_name,
    dtype_name,
    is_dense,
    same_dtype,
    same_form,
    same_layout,
    same_shape,
    shape_of,
    size_of,
    strides_of,
)


def is_array(candidate):
    """Whether `candidate` is an array: an object whose type speaks DLPack.

    Parameters
    ----------
    candidate : object

    Returns
    -------
    bool
    """
    return _is_array(candidate)


def dtype_of(array):
    """The dtype of an array, by its name.

    Parameters
    ----------
    array : array
        Of any library that speaks DLPack.

    Returns
    -------
    str
        "float32", for instance.

    Raises
    ------
    TypeError, ValueError, BufferError
        `array` lends no memory.
    """
    cdef Borrowed borrowed
    cdef Known known
    memset(&known, 0, sizeof(known))
    borrow(array, False, &borrowed, &known, None)
    name = dtype_name(borrowed.tensor.dtype)
    give_back(&borrowed)
    forget(&known)
    return name


def whereabouts_of(array):
    """Where an array is, and how it is laid out.

    Parameters
    ----------
    array : array

    Returns
    -------
    address : int
    device : int or None
        The number of its CUDA device; None for memory of the CPU.
    stream : int
        On which its library works there at the moment.
    shape, strides : tuple of int
        In elements.

    Raises
    ------
    TypeError, ValueError, BufferError
        `array` lends no memory.
    """
    cdef Borrowed borrowed
    cdef Known known
    memset(&known, 0, sizeof(known))
    borrow(array, False, &borrowed, &known, None)
    try:
        device = _number_of(borrowed.tensor.device)
        return (
            <uintptr_t>data_of(&borrowed.tensor),
            device if device >= 0 else None,
            (borrowed.stream or LEGACY_STREAM) if device >= 0 else 0,
            shape_of(&borrowed.tensor),
            strides_of(&borrowed.tensor),
        )
    finally:
        give_back(&borrowed)
        forget(&known)


def lent(list spare, tuple names):
    """Lend an empty table, which remembers the arrays that it held last, to a with statement.

    Parameters
    ----------
    spare : list of Rows
        Those that nobody uses at the moment; a new one is made when there is none.
    names : tuple of str
        As for `Rows`.

    Returns
    -------
    Rows
        Given back at the end of the with statement.
    """
    cdef Rows table = spare.pop() if spare else Rows(names)
    table.names = names
    table._spare = spare
    return table


cdef class Rows:
    """The rows of one step, each a param with its grad and, unless none is kept, its average.

    Rows are added, then checked against each other by `check_overlap`; only then may an engine
    write. The arrays stay borrowed until `clear` or the table's end; a table that has raised has
    given them back and is empty. A table that is used again remembers what it found of the same
    arrays.

    Parameters
    ----------
    names : tuple of str
        What messages call the i-th param, grad and average, as format strings of i:
        ``("params[{}]", "grads[{}]", "axs[{}]")``. An attribute, too.
    """

    def __cinit__(self, tuple names):
        self.rows = NULL
        self.n_rows = 0
        self.work = 0
        self.has_gpu_rows = False
        self.on_device = NULL
        self._n_on_device = 0
        self._on_device_capacity = 0
        self.streams = {}
        self.others = {}
        self.device = CPU
        self._capacity = 0
        self._lent = NULL
        self._n_lent = 0
        self._checked = NULL
        self._n_checked = 0
        self._known = NULL
        self._spans = NULL
        self.names = names
        self._owners = NULL
        self._n_owners = 0
        self._owner_capacity = 0

    def __dealloc__(self):
        cdef Py_ssize_t i
        self.clear()
        free(self._owners)
        free(self.on_device)
        for i in range(3 * self._capacity):
            forget(&self._known[i])
        free(self._known)
        free(self._spans)
        free(self._checked)
        free(self._lent)
        free(self.rows)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        cdef list spare = self._spare
        self.clear()
        if spare is not None:
            self._spare = None
            spare.append(self)

    def __len__(self):
        return self.n_rows

    def __reduce__(self):
        # What a table holds is only of use here and now.
        return Rows, (self.names,)

    def clear(self):
        """Give every array back, and keep the memory of the rows for the next step."""
        self.n_rows = 0
        self.work = 0
        if self.has_gpu_rows:
            self.has_gpu_rows = False
            self.streams.clear()
            self.others.clear()
            self.device = CPU
            self._n_on_device = 0
            self.grad_scale = self.found_inf = None
        self._give_back(0)
        while self._n_owners > 0:
            self._n_owners -= 1
            Py_DECREF(<object>self._owners[self._n_owners])

    def extend(
        self,
        list params,
        list grads=None,
        list axs=None,
        *,
        double eta=0.0,
        double mu=1.0,
        double[:, ::1] scalars=None,
        double lr=0.0,
        double lambd=0.0,
        double alpha=0.0,
        double t0=0.0,
        const double[::1] starts=None,
        double average_every=1.0,
        bint current=False,
        double weight_decay=0.0,
        double grad_scale=1.0,
        Py_ssize_t first=0,
        bint partial=False,
    ):
        """Add a row for each param.

        Parameters
        ----------
        params : list of array
            float16, bfloat16, float32, float64, complex64 or complex128, dense, writable, in the
            memory of the CPU or of a CUDA device.
        grads : list of array, optional
            Of the shape, dtype, device and memory layout of their params; may be read-only.
            Without the list the rows are of params alone, and only good for checking them.
        axs : list of array, optional
            The averages, like their params, or in a wider dtype: float32 or float64. Without the
            list none is kept.
        eta, mu : float
            For all rows, where there are no scalars.
        scalars : float64 array of shape (len(params), 3), optional
            The step, eta and mu of each param, which the engine advances with the step. The eta of
            step 0 is not read: it is lr. The average of a param whose mu is 0 is left as it is.
        lr, alpha, t0, average_every, current
            What scalars are advanced with: see `next_scalars`.
        starts : float64 array of shape (len(params),), optional
            The t0 of single params; nan where `t0` holds.
        lambd, weight_decay : float
        grad_scale : float
            Multiplies each grad first; negative to maximize.
        first : int
            The number of params before these, for messages.
        partial : bool
            Leave out the params whose grad is None.

        Raises
        ------
        TypeError
            An argument is not an array.
        ValueError
            The dtype, device, shape or memory layout of an array is not what it must be.
        BufferError
            The memory of a param or an average may not be written.
        """
        cdef Py_ssize_t i, n = len(params)
        cdef Row *row
        cdef Scalars *now
        cdef Plan plan = Plan(lr, lambd, alpha, t0, average_every, current)
        for each in (grads, axs, scalars, starts):
            if each is not None and len(each) != n:
                raise ValueError(f"got {len(each)} for {n} params; expected one for each")
        self.reserve(n)
        self._own((params, grads, axs, scalars))
        try:
            for i in range(n):
                if partial and grads[i] is None:
                    continue
                row = self.begin(first + i)
                self._take(PARAM, params[i])
                if grads is not None:
                    self._take(GRAD, grads[i])
                row.eta = eta
                row.mu = mu
                row.decay = 1.0 - lambd * eta
                if scalars is not None:
                    now = <Scalars *>&scalars[i, 0]
                    plan.t0 = t0 if starts is None or isnan(starts[i]) else starts[i]
                    if current:
                        row.eta = scalars_after(now.step, &plan).eta
                    else:
                        row.eta = lr if now.step == 0 else now.eta
                    row.mu = now.mu
                    row.decay = decay_of(row.eta, now.step, &plan)
                    row.scalars = now
                    row.double_scalars = True
                    row.next = scalars_after(now.step + 1, &plan)
                if axs is not None and (scalars is None or row.mu != 0):
                    self._take(AX, axs[i])
                row.weight_decay = weight_decay
                row.grad_scale = grad_scale
                self.commit(None)
        except BaseException:
            self.clear()
            raise

    def check_overlap(self):
        """Check that nothing which is written shares memory with anything else in the table.

        Raises
        ------
        ValueError
            Two arrays share memory and at least one of them is written, or a param is listed twice.
        """
        cdef Py_ssize_t n = 0, i
        cdef int role
        cdef Memory *memory
        cdef Span *spans = self._spans
        if self._was_checked():
            return
        # Each role by itself: libraries often hand out memory in order, which spares the sort.
        for role in range(3):
            for i in range(self.n_rows):
                memory = &self._checked[i]
                address = _address(memory, role)
                if memory.size == 0 or address == NULL:
                    continue
                spans[n].start = <uintptr_t>address
                spans[n].stop = spans[n].start + (memory.ax_size if role == AX else memory.size)
                spans[n].row = i
                spans[n].role = role
                n += 1
        try:
            _refuse_overlaps(self, _sorted(spans, spans + 3 * self._capacity, n), n)
        except ValueError:
            self._n_checked = 0
            self.clear()
            raise

    def touches(self, uintptr_t start, uintptr_t stop):
        """Whether an array of the table has any of the bytes from `start` up to `stop`.

        Parameters
        ----------
        start, stop : int
            Addresses.

        Returns
        -------
        bool
        """
        cdef Py_ssize_t i
        cdef int role
        cdef Memory memory
        for i in range(self.n_rows):
            memory = _memory_of(&self.rows[i])
            for role in range(3):
                address = <uintptr_t>_address(&memory, role)
                if address < stop and start < address + (
                        memory.ax_size if role == AX else memory.size):
                    return True
        return False

    cdef bint _was_checked(self) noexcept:
        """Whether the rows have the memory that was checked last, which it notes."""
        cdef Py_ssize_t i
        cdef Memory now
        cdef Memory *memory
        cdef bint same = self._n_checked == self.n_rows
        for i in range(self.n_rows):
            memory = &self._checked[i]
            now = _memory_of(&self.rows[i])
            same &= (
                memory.param == now.param and memory.grad == now.grad and memory.ax == now.ax
                and memory.size == now.size and memory.ax_size == now.ax_size
            )
            memory[0] = now
        self._n_checked = self.n_rows
        return same

    cdef int reserve(self, Py_ssize_t more) except -1:
        """Make room, so that `append` cannot fail."""
        cdef Py_ssize_t needed = self.n_rows + more
        if needed <= self._capacity:
            return 0
        cdef void *rows = realloc(self.rows, needed * sizeof(Row))
        if rows == NULL:
            raise MemoryError
        self.rows = <Row *>rows
        cdef void *lent = realloc(self._lent, 3 * needed * sizeof(Borrowed))
        if lent == NULL:
            raise MemoryError
        self._lent = <Borrowed *>lent
        cdef void *checked = realloc(self._checked, needed * sizeof(Memory))
        if checked == NULL:
            raise MemoryError
        self._checked = <Memory *>checked
        cdef void *known = realloc(self._known, 3 * needed * sizeof(Known))
        if known == NULL:
            raise MemoryError
        self._known = <Known *>known
        memset(&self._known[3 * self._capacity], 0, 3 * (needed - self._capacity) * sizeof(Known))
        cdef void *spans = realloc(self._spans, 6 * needed * sizeof(Span))
        if spans == NULL:
            raise MemoryError
        self._spans = <Span *>spans
        self._capacity = needed
        return 0

    cdef Row *begin(self, Py_ssize_t index) noexcept:
        """Begin a row that holds nothing yet; it counts after `commit`, or not after `abandon`."""
        cdef Row *row = &self.rows[self.n_rows]
        row.grad = NULL
        row.ax = NULL
        row.scalars = NULL
        row.on_device = 0
        row.index = index
        self._n_lent_before = self._n_lent
        return row

    cdef str settle(self, int role):
        """Put a borrowed array into the row, or return why it is not fit for it."""
        cdef Borrowed *borrowed = &self.arrays[role]
        cdef DLTensor *tensor = &borrowed.tensor
        cdef Row *row = &self.rows[self.n_rows]
        cdef void *data = data_of(tensor)
        if borrowed.versioned != NULL or borrowed.legacy != NULL:
            self._lent[self._n_lent] = borrowed[0]
            self._n_lent += 1
        if role == PARAM:
            fault = self._fault(role)
        elif (
            same_form(tensor, &self.arrays[PARAM].tensor)
            and tensor.data != NULL
            and (
                same_dtype(tensor, &self.arrays[PARAM].tensor)
                or self._goes_with_param(role)
            )
            and <uintptr_t>data & ((row.ax_size if role == AX else row.size) - 1) == 0
        ):
            fault = None
        else:
            fault = self._fault(role) or self._mismatch(role)
        if fault is not None:
            return fault
        if role == GRAD:
            row.grad = data
        elif role == AX:
            row.ax = data
        else:
            row.param = data
            row.device = _number_of(tensor.device)
            row.n = size_of(tensor) * (2 if tensor.dtype.code == kDLComplex else 1)
            row.size = row.ax_size = _bytes_of_reals(tensor.dtype)
            if tensor.dtype.code == kDLBfloat:
                row.kind = BFLOAT16
            else:
                row.kind = FLOAT16 if row.size == 2 else FLOAT32 if row.size == 4 else FLOAT64
        return None

    cdef bint _goes_with_param(self, int role) noexcept:
        """Whether the dtype of the array goes with that of its param; notes that of an average."""
        cdef Row *row = &self.rows[self.n_rows]
        cdef DLDataType dtype = self.arrays[role].tensor.dtype
        cdef DLDataType param = self.arrays[PARAM].tensor.dtype
        cdef int size
        if same_dtype(&self.arrays[role].tensor, &self.arrays[PARAM].tensor):
            return True
        size = _bytes_of_reals(dtype)
        if role != AX or size <= row.size or size == 2 or (
                (dtype.code == kDLComplex) != (param.code == kDLComplex)):
            return False
        row.ax_size = size
        return True

    cdef int commit(self, owner) except -1:
        """Count the row. `owner` keeps an array alive that nothing else may."""
        cdef Row *row = &self.rows[self.n_rows]
        cdef int64_t size = row.n * row.size
        self._own(owner)
        row.offset = self.work
        if row.device == CPU:
            self.work += (size + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
        self.n_rows += 1
        return 0

    cdef int _own(self, owner) except -1:
        cdef Py_ssize_t capacity = max(64, 2 * self._owner_capacity)
        cdef void *owners
        if self._n_owners == self._owner_capacity:
            owners = realloc(self._owners, capacity * sizeof(PyObject *))
            if owners == NULL:
                raise MemoryError
            self._owners = <PyObject **>owners
            self._owner_capacity = capacity
        Py_INCREF(owner)
        self._owners[self._n_owners] = <PyObject *>owner
        self._n_owners += 1
        return 0

    cdef int note_stream(self, uintptr_t stream) except -1:
        """Take note of where an array of the row's GPU is worked on: as `stream_of`."""
        cdef int device = self.rows[self.n_rows].device
        if device == self.device and stream == self._stream:
            return 0
        self.has_gpu_rows = True
        self.device = device
        self._stream = stream
        if stream != self.streams.setdefault(device, stream or LEGACY_STREAM):
            self.others.setdefault(device, set()).add(stream)
        return 0

    cdef OnDevice *put_on_device(self) except NULL:
        """Let the GPU have the scalars of the row, which are to be filled in."""
        cdef Py_ssize_t capacity = max(64, 2 * self._on_device_capacity)
        cdef void *room
        if self._n_on_device == self._on_device_capacity:
            room = realloc(self.on_device, capacity * sizeof(OnDevice))
            if room == NULL:
                raise MemoryError
            self.on_device = <OnDevice *>room
            self._on_device_capacity = capacity
        self._n_on_device += 1
        self.rows[self.n_rows].on_device = self._n_on_device
        return &self.on_device[self._n_on_device - 1]

    cdef void abandon(self) noexcept:
        """Give back what was lent for the row."""
        self._give_back(self._n_lent_before)

    cdef void _give_back(self, Py_ssize_t keep) noexcept:
        while self._n_lent > keep:
            self._n_lent -= 1
            give_back(&self._lent[self._n_lent])

    cdef int _take(self, int role, object array) except -1:
        """Borrow one array of the row, and check it alone and against the row's param."""
        try:
            borrow(
                array, role != GRAD, &self.arrays[role], &self._known[3 * self.n_rows + role],
                self.streams)
            fault = self.settle(role)
            if fault is not None:
                raise ValueError(fault)
            if self.rows[self.n_rows].device != CPU:
                self.note_stream(self.arrays[role].stream)
        except (TypeError, ValueError, BufferError) as error:
            raise _named(self._name(role, self.n_rows), error) from error.__cause__
        return 0

    cdef str _fault(self, int role):
        """Why an array of the row cannot be updated, whatever the others are; or None."""
        cdef DLTensor *tensor = &self.arrays[role].tensor
        cdef int size = _bytes_of_reals(tensor.dtype)
        if size == 0:
            return (f"dtype {dtype_name(tensor.dtype)} is not supported; expected float16, "
                    "bfloat16, float32, float64, complex64 or complex128")
        if _number_of(tensor.device) == ELSEWHERE:
            return (f"device {device_name(tensor)} is not supported; expected an array in the "
                    "memory of the CPU or of a CUDA device")
        if size_of(tensor) == 0:
            return None
        if tensor.data == NULL:
            return "its elements have no memory (the address is NULL)"
        if not is_dense(tensor):
            return (f"strides {strides_of(tensor)} of shape {shape_of(tensor)} leave gaps or "
                    "repeat elements; expected a contiguous array, in C, Fortran or any other "
                    "axis order")
        if <uintptr_t>data_of(tensor) % size:
            return (f"address {<uintptr_t>data_of(tensor):#x} is not a multiple of its "
                    f"{size}-byte numbers; expected aligned memory")
        return None

    cdef str _mismatch(self, int role):
        """Why an array of the row does not go with its param; or None."""
        cdef DLTensor *tensor = &self.arrays[role].tensor
        cdef DLTensor *param = &self.arrays[PARAM].tensor
        if not self._goes_with_param(role):
            what, got, wanted = "dtype", dtype_name(tensor.dtype), dtype_name(param.dtype)
        elif _number_of(tensor.device) != _number_of(param.device):
            what, got, wanted = "device", device_name(tensor), device_name(param)
        elif not same_shape(tensor, param):
            what, got, wanted = "shape", shape_of(tensor), shape_of(param)
        elif not same_layout(tensor, param):
            what, got, wanted = "strides", strides_of(tensor), strides_of(param)
        else:
            return None
        name = self._name(PARAM, self.n_rows)
        wider = " and is no wider one" if what == "dtype" and role == AX else ""
        return f"{what} {got} does not match {name} of {what} {wanted}{wider}"

    cdef str _name(self, int role, Py_ssize_t row):
        return self.names[role].format(self.rows[row].index)


def _named(str name, error):
    """An error of the same kind that says which array it is about."""
    kind = next(k for k in (BufferError, TypeError, ValueError) if isinstance(error, k))
    return kind(f"{name}: {error}")


cdef enum:
    ELSEWHERE = -2  # memory of neither the CPU nor a GPU of CUDA


cdef int _number_of(DLDevice device) noexcept:
    """Which device of `Row` it is."""
    if device.device_type in (kDLCPU, kDLCUDAHost, kDLROCMHost):
        return CPU
    if device.device_type in (kDLCUDA, kDLCUDAManaged):
        return device.device_id
    return ELSEWHERE


cdef int _bytes_of_reals(DLDataType dtype) noexcept:
    """The size of the real numbers that a supported dtype is made of; else 0."""
    if dtype.lanes != 1:
        return 0
    if dtype.code == kDLFloat and dtype.bits in (16, 32, 64):
        return dtype.bits // 8
    if dtype.code == kDLBfloat and dtype.bits == 16:
        return 2
    if dtype.code == kDLComplex and dtype.bits in (64, 128):
        return dtype.bits // 16
    return 0


cdef inline Memory _memory_of(const Row *row) noexcept:
    cdef Memory memory
    memory.param = row.param
    memory.grad = row.grad
    memory.ax = row.ax
    memory.size = row.n * row.size
    memory.ax_size = row.n * row.ax_size
    return memory


cdef const void *_address(const Memory *memory, int role) noexcept:
    if role == PARAM:
        return memory.param
    return memory.grad if role == GRAD else memory.ax


cdef int _refuse_overlaps(Rows table, Span *spans, Py_ssize_t n) except -1:
    """Sweep over spans in the order of their starts, with those that reach furthest so far."""
    cdef Py_ssize_t i
    cdef Span *furthest = NULL          # of all spans
    cdef Span *furthest_written = NULL  # of those that are written
    cdef Span *span
    cdef Span *other
    for i in range(n):
        span = &spans[i]
        other = furthest_written if span.role == GRAD else furthest
        if other != NULL and span.start < other.stop:
            if (span.row, span.role) < (other.row, other.role):
                span, other = other, span
            late, early = table._name(span.role, span.row), table._name(other.role, other.row)
            if span.role == PARAM and other.role == PARAM and span.start == other.start:
                raise ValueError(f"{late}: is {early} again; expected each param once")
            raise ValueError(
                f"{late}: shares memory with {early}; "
                "expected no overlap with an array that is written")
        if furthest == NULL or span.stop > furthest.stop:
            furthest = span
        if span.role != GRAD:  # written spans do not overlap, so the last one reaches furthest
            furthest_written = span
    return 0


cdef Span *_sorted(Span *spans, Span *spare, Py_ssize_t n) noexcept:
    """Merge the runs that are in order already, forwards or backwards, until one is left."""
    cdef Py_ssize_t start, middle, stop, n_runs = 2
    while n_runs > 1:
        n_runs = start = 0
        while start < n:
            middle = _end_of_run(spans, start, n)
            stop = _end_of_run(spans, middle, n)
            _merge(spans, spare, start, middle, stop)
            start = stop
            n_runs += 1
        spans, spare = spare, spans
    return spans


cdef Py_ssize_t _end_of_run(Span *spans, Py_ssize_t start, Py_ssize_t n) noexcept:
    """Where the run from `start` ends; a descending one is turned round."""
    cdef Py_ssize_t stop = start + 1, last
    if stop < n and spans[stop].start < spans[start].start:
        while stop < n and spans[stop].start < spans[stop - 1].start:
            stop += 1
        last = stop - 1
        while start < last:
            spans[start], spans[last] = spans[last], spans[start]
            start += 1
            last -= 1
    else:
        while stop < n and spans[stop].start >= spans[stop - 1].start:
            stop += 1
    return min(stop, n)


cdef void _merge(
    const Span *spans, Span *into, Py_ssize_t start, Py_ssize_t middle, Py_ssize_t stop,
) noexcept:
    """Merge spans[start:middle] and spans[middle:stop], each in order, into[start:stop]."""
    cdef Py_ssize_t left = start, right = middle, i
    for i in range(start, stop):
        if right == stop or (left < middle and spans[left].start <= spans[right].start):
            into[i] = spans[left]
            left += 1
        else:
            into[i] = spans[right]
            right += 1
