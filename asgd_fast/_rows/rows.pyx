"""The rows of one step: arrays come in, and each is checked before the first byte is written.

This module knows which arrays can be updated in one in-place pass. It does not know how the pass is
made (the engines), nor what a group is (the faces).
"""

from libc.math cimport isnan
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy
cimport numpy as np

from asgd_fast._rows.describe cimport (
    copy_like,
    data_of,
    device_name,
    dtype_name,
    is_dense,
    n_elements,
    same_dtype,
    same_form,
    same_layout,
    same_shape,
    shape_of,
    strides_of,
)
from asgd_fast._rows.dlpack cimport (
    Borrowed,
    DLDataType,
    DLDevice,
    DLTensor,
    LEGACY_STREAM,
    borrow,
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
    lendable,
)
from asgd_fast._rows.overlap cimport any_touches, find_overlap
from asgd_fast._schedule cimport Plan, Scalars, Step, averages, fill, plan_of


def is_array(candidate):
    """Whether `candidate` is an array: an object whose type speaks DLPack."""
    return _is_array(candidate)


def dtype_of(array):
    """The name of the dtype of an array, such as "float32". Raises as `borrow`."""
    cdef Borrowed borrowed
    borrow(array, False, &borrowed, None)
    try:
        return dtype_name(borrowed.tensor.dtype)
    finally:
        give_back(&borrowed)


def whereabouts_of(array):
    """The address, device, stream, shape and strides of an array. Raises as `borrow`.

    The device is the number of a CUDA device, None for the CPU; the stream is that on which the
    array's library works there at the moment; strides are in elements.
    """
    cdef Borrowed borrowed
    borrow(array, False, &borrowed, None)
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


# What a row takes with its step and its spans, each twice for the sort: see `find_overlap`.
cdef enum:
    ROOM = sizeof(Row) + sizeof(Step) + 6 * sizeof(Span)

cdef class Rows:
    """The rows of one step, each a param with its grad and, unless none is kept, its average.

    Rows are added, then checked against each other by `check_overlap`; only then may an engine
    write. The arrays stay borrowed until `clear` or the end of the object. Rows that have raised
    have given their arrays back and are empty.

    Parameters
    ----------
    names : tuple of str
        What messages call the i-th param, grad and average, as format strings of i:
        ``("params[{}]", "grads[{}]", "axs[{}]")``. An attribute, too.
    """

    def __cinit__(self, tuple names):
        # Cython has set all else to 0, NULL or None.
        self.names = names
        self.streams = {}
        self.others = {}
        self.device = CPU
        self._indices = []
        self.kept = []

    def __dealloc__(self):
        self._give_back(0)
        free(self._borrowed)
        free(self.mirrors)
        free(self.rows)

    def __len__(self):
        return self.n_rows

    def clear(self):
        """Give every array back."""
        self.n_rows = self._n_steps = self.n_mirrors = 0
        self.cpu_bytes = 0
        self.has_gpu_rows = False
        self.device_rows = None
        self.device = CPU
        self.streams.clear()
        self.others.clear()
        self._indices.clear()
        self._give_back(0)
        self.kept.clear()

    def extend(
        self,
        list params,
        list grads=None,
        list axs=None,
        *,
        double eta=0.0,
        double mu=1.0,
        np.ndarray scalars=None,
        double lr=0.0,
        double lambd=0.0,
        double alpha=0.0,
        double t0=0.0,
        np.ndarray starts=None,
        double average_every=1.0,
        averaging="mean",
        bint current=False,
        double weight_decay=0.0,
        double grad_scale=1.0,
        Py_ssize_t first=0,
        new_average=None,
        bint copy_grads=False,
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
        scalars : contiguous float64 array of shape (len(params), 3), optional
            The step, eta and mu of each param, which the engine advances with the step. The eta of
            step 0 is not read: it is lr.
        lr, lambd, alpha, t0, average_every, averaging, current, weight_decay
            The hyperparameters: see `next_scalars`.
        starts : contiguous float64 array of shape (len(params),), optional
            The t0 of single params; nan where `t0` holds.
        grad_scale : float
            Multiplies each grad first; negative to maximize.
        first : int
            The number of params before these, for messages.
        new_average : callable, optional
            Makes the average of the i-th param that begins with this step. With it, a param whose
            grad is None gets no row, an average that is None has not begun, and one whose mu is 0
            is left as it is.
        copy_grads : bool
            Whether a grad of the CPU in another layout than its param's is copied into that, and a
            scalar of NumPy is taken for an array; else both are refused.

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
        # Of each param; by address, as a memoryview takes half a microsecond.
        cdef Scalars *own = NULL if scalars is None else <Scalars *>np.PyArray_DATA(scalars)
        cdef const double *start = NULL if starts is None else <double *>np.PyArray_DATA(starts)
        cdef bint partial = new_average is not None
        cdef Row *row
        cdef Scalars now = Scalars(0, eta, mu)
        cdef Plan plan = plan_of(lr, lambd, alpha, t0, average_every, averaging, current)
        plan.weight_decay, plan.grad_scale = weight_decay, grad_scale
        for each in (grads, axs, scalars, starts):
            if each is not None and len(each) != n:
                raise ValueError(f"got {len(each)} for {n} params; expected one for each")
        self.begin_group(n)
        self.kept.append((params, grads, axs, scalars))
        try:
            for i in range(n):
                if partial and grads[i] is None:
                    continue
                self._indices.append(first + i)
                row = self.begin()
                self._take(PARAM, params[i])
                if grads is not None:
                    self._take(GRAD, grads[i], copy_grads)
                if scalars is not None:
                    row.scalars = &own[i]
                    now = row.scalars[0]
                    if now.step == 0:
                        now.eta = lr
                    plan.t0 = t0 if starts is None or isnan(start[i]) else start[i]
                row.step = self.step_for(&now, &plan)
                ax = None if axs is None else axs[i]
                if partial and ax is None and averages(row.step):
                    ax = new_average(first + i)
                if axs is not None and not partial or ax is not None and row.step.mu != 0:
                    self._take(AX, ax)
                self.commit()
        except BaseException:
            self.clear()
            raise

    def check_overlap(self):
        """Check that nothing which is written shares memory with anything else in the rows.

        Raises
        ------
        ValueError
            Two arrays share memory and at least one of them is written, or a param is listed twice.
        """
        cdef Span late, early
        if not find_overlap(self.rows, self.n_rows, self._spans, &late, &early):
            return
        one, other = self.name(late.role, late.row), self.name(early.role, early.row)
        self.clear()
        if late.role == PARAM and early.role == PARAM and late.start == early.start:
            raise ValueError(f"{one}: is {other} again; expected each param once")
        raise ValueError(
            f"{one}: shares memory with {other}; expected no overlap with an array that is written")

    def is_disjoint(self):
        """Whether nothing which is written shares memory with anything else in the rows."""
        cdef Span late, early
        return not find_overlap(self.rows, self.n_rows, self._spans, &late, &early)

    def touches(self, list others):
        """Whether the rows share memory with others, given by where each begins and ends."""
        cdef Py_ssize_t n = len(others), i
        if n == 0:
            return False
        cdef Span *room = <Span *>malloc(2 * (3 * self.n_rows + n) * sizeof(Span))
        if room == NULL:
            raise MemoryError
        try:
            for i in range(n):
                room[3 * self.n_rows + i].start, room[3 * self.n_rows + i].stop = others[i]
            return any_touches(self.rows, self.n_rows, room, n)
        finally:
            free(room)

    cdef int begin_group(self, Py_ssize_t n) except -1:
        """Make room for the n rows of a group, whose plans differ in t0 and in rounding alone."""
        self._shares_step = False
        return self.reserve(n)

    cdef int reserve(self, Py_ssize_t more) except -1:
        """Make room for rows that are to come."""
        cdef Py_ssize_t needed = max(self.n_rows, self._n_steps) + more, i
        cdef Row *rows
        cdef Step *steps
        if needed <= self._capacity:
            return 0
        needed = max(needed, 2 * self._capacity)
        rows = <Row *>malloc(needed * ROOM)
        if rows == NULL:
            raise MemoryError
        steps = <Step *>(rows + needed)
        if self.n_rows != 0:
            memcpy(rows, self.rows, self.n_rows * sizeof(Row))
        if self._n_steps != 0:
            memcpy(steps, self._steps, self._n_steps * sizeof(Step))
        for i in range(self.n_rows):
            if rows[i].step != NULL:  # NULL: a GPU has the scalars
                rows[i].step = steps + (rows[i].step - self._steps)
        free(self.rows)
        self.rows, self._steps, self._spans = rows, steps, <Span *>(steps + needed)
        self._capacity = needed
        return 0

    cdef Row *begin(self) noexcept:
        """Begin a row that holds nothing yet; it counts after `commit`, or not after `abandon`."""
        cdef Row *row = &self.rows[self.n_rows]
        row.grad = NULL
        row.ax = NULL
        row.scalars = NULL
        row.device_row = 0
        self._n_borrowed_before = self._n_borrowed
        return row

    cdef str put(self, int role):
        """Put a borrowed array into the row, or return why no engine can take it."""
        cdef Borrowed *borrowed = &self.arrays[role]
        cdef DLTensor *tensor = &borrowed.tensor
        cdef Row *row = &self.rows[self.n_rows]
        cdef void *data = data_of(tensor)
        if borrowed.versioned != NULL or borrowed.legacy != NULL:
            self._keep_borrowed(borrowed)
        if role == PARAM:
            fault = self._fault(role)
        elif (
            same_form(tensor, &self.arrays[PARAM].tensor)
            and tensor.data != NULL
            and (
                same_dtype(tensor, &self.arrays[PARAM].tensor)
                or self._goes_with_param(role)
            )
            and <uintptr_t>data & ((row.ax_size if role == AX else size_of(row.kind)) - 1) == 0
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
            row.n = n_elements(tensor) * (2 if tensor.dtype.code == kDLComplex else 1)
            row.ax_size = _bytes_of_reals(tensor.dtype)
            if tensor.dtype.code == kDLBfloat:
                row.kind = BFLOAT16
            else:
                row.kind = FLOAT16 if row.ax_size == 2 else FLOAT32 if row.ax_size == 4 else FLOAT64
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
        if role != AX or size <= size_of(row.kind) or size == 2 or (
                (dtype.code == kDLComplex) != (param.code == kDLComplex)):
            return False
        row.ax_size = size
        return True

    cdef Step *step_for(self, const Scalars *now, const Plan *plan) noexcept:
        """The step of the row: a new one, unless the row before in its group had the same."""
        cdef Step *step = &self._steps[self._n_steps]
        if (
            self._shares_step
            and memcmp(now, &self._now, sizeof(Scalars)) == 0
            # In all else the plans of a group are the same.
            and plan.t0 == self._plan.t0
            and plan.float_step == self._plan.float_step
            and plan.float_next == self._plan.float_next
        ):
            return step - 1
        fill(step, now, plan)
        self._now, self._plan = now[0], plan[0]
        self._shares_step = True
        self._n_steps += 1
        return step

    cdef int commit(self) except -1:
        """Count the row."""
        cdef Row *row = &self.rows[self.n_rows]
        cdef int64_t size = row.n * size_of(row.kind)
        row.offset = self.cpu_bytes
        if row.device == CPU:
            self.cpu_bytes += (size + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
        self.n_rows += 1
        return 0

    cdef int mirror(self, const Mirror *mirror) except -1:
        """Let the engine write a row's scalars elsewhere, too."""
        self.mirrors = <Mirror *>with_room(self.mirrors, self.n_mirrors, sizeof(Mirror))
        self.mirrors[self.n_mirrors] = mirror[0]
        self.n_mirrors += 1
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

    cdef void abandon(self) noexcept:
        """Give back what was lent for the row."""
        self._give_back(self._n_borrowed_before)

    cdef void _give_back(self, Py_ssize_t keep) noexcept:
        while self._n_borrowed > keep:
            self._n_borrowed -= 1
            give_back(&self._borrowed[self._n_borrowed])

    cdef int _keep_borrowed(self, Borrowed *borrowed) except -1:
        try:
            self._borrowed = <Borrowed *>with_room(
                self._borrowed, self._n_borrowed, sizeof(Borrowed))
        except MemoryError:
            give_back(borrowed)
            raise
        self._borrowed[self._n_borrowed] = borrowed[0]
        self._n_borrowed += 1
        return 0

    cdef int _take(self, int role, object array, bint copies=False) except -1:
        """Borrow one array of the row, and check it alone and against the row's param."""
        try:
            if copies:
                array = lendable(array)
                self.kept.append(array)
            borrow(array, role != GRAD, &self.arrays[role], self.streams)
            fault = self.put(role)
            if fault is not None and not (copies and self._copy_grad()):
                raise ValueError(fault)
            if self.rows[self.n_rows].device != CPU:
                self.note_stream(self.arrays[role].stream)
        except (TypeError, ValueError, BufferError) as error:
            raise _named(self.name(role, self.n_rows), error) from error.__cause__
        return 0

    cdef bint _copy_grad(self) except -1:
        """Put a copy of the grad into the row, if nothing but its layout is unlike the param's."""
        cdef Row *row = &self.rows[self.n_rows]
        cdef DLTensor *grad = &self.arrays[GRAD].tensor
        cdef DLTensor *param = &self.arrays[PARAM].tensor
        if not (
            row.device == CPU == _number_of(grad.device)
            and grad.data != NULL
            and same_dtype(grad, param)
            and same_shape(grad, param)
        ):
            return False
        self.kept.append(copy_like(grad, param, &row.grad))
        return True

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
        if n_elements(tensor) == 0:
            return None
        if tensor.data == NULL:
            return "its elements have no memory (the address is NULL)"
        if not is_dense(tensor):
            return (f"strides {strides_of(tensor)} of shape {shape_of(tensor)} leave gaps or "
                    "repeat elements; expected a contiguous array, in C, Fortran or any other "
                    "axis order, such as np.ascontiguousarray makes")
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
        name = self.name(PARAM, self.n_rows)
        note = ""
        if what == "dtype" and role == AX:
            note = " and is no wider one"
        elif what == "strides" and role == GRAD:
            note = "; expected a copy in that layout: np.ascontiguousarray makes those in C order"
        return f"{what} {got} does not match {name} of {what} {wanted}{note}"

    cdef str name(self, int role, Py_ssize_t row):
        """What messages call an array of a row."""
        return self.names[role].format(self._indices[row] if row < len(self._indices) else row)


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
    # `Row.device` has 15 bits for it.
    if device.device_type in (kDLCUDA, kDLCUDAManaged) and 0 <= device.device_id < 1 << 15:
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
