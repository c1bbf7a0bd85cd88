"""The rows of one step: takes the arrays in and checks every one before the first byte is written.

This module knows what makes arrays fit for one in-place pass; it does not know how the pass is made
(the engines), nor what a sequence, a group or a schedule is (update and the faces above it).
"""

from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc, qsort, realloc

from asgd_fast._dlpack cimport (
    Borrowed,
    DLDataType,
    DLTensor,
    borrow,
    give_back,
    is_array as _is_array,
    kDLCPU,
    kDLCUDAHost,
    kDLFloat,
    kDLROCMHost,
)
from asgd_fast._tensor cimport (
    data_of,
    device_name,
    dtype_name,
    is_dense,
    same_layout,
    same_shape,
    shape_of,
    size_of,
    strides_of,
)


cdef enum:  # the three arrays of a row
    PARAM = 0
    GRAD = 1
    AX = 2


cdef struct Span:  # the bytes of one borrowed array
    uintptr_t start
    uintptr_t stop
    Py_ssize_t row
    int role


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


cdef class Table:
    """The rows of one step, each a param with its grad and, unless none is kept, its average.

    Rows are added by `extend`, then checked against each other by `check_overlap`; only then may an
    engine write. The arrays stay borrowed until the table is gone; a table that has raised has
    given them back and is empty.

    Parameters
    ----------
    names : tuple of str
        What messages call the i-th param, grad and average, as format strings of i:
        ``("params[{}]", "grads[{}]", "axs[{}]")``.
    """

    def __cinit__(self, tuple names):
        self.rows = NULL
        self.n_rows = 0
        self._capacity = 0
        self._borrowed = NULL
        self._names = names
        self._owners = []

    def __dealloc__(self):
        self._clear()
        free(self._borrowed)
        free(self.rows)

    cdef void _clear(self) noexcept:
        """Give every array back."""
        cdef int role
        while self.n_rows > 0:
            self.n_rows -= 1
            for role in range(3):
                give_back(&self._borrowed[self.n_rows][role])

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
        double weight_decay=0.0,
        double grad_scale=1.0,
        Py_ssize_t first=0,
        bint partial=False,
    ):
        """Add a row for each param.

        Parameters
        ----------
        params : list of array
            float32 or float64, dense, writable, in CPU memory.
        grads : list of array, optional
            Of the shape, dtype, device and memory layout of their params; may be read-only.
            Without the list the rows are of params alone, and only good for checking them.
        axs : list of array, optional
            The averages, like their params. Without the list none is kept.
        eta, mu : float
            For all rows, where there are no scalars.
        scalars : float64 array of shape (len(params), 3), optional
            The step, eta and mu of each param, which the engine advances with the step. The eta of
            step 0 is not read: it is lr.
        lr, alpha, t0 : float
            What scalars are advanced with.
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
        for each in (grads, axs, scalars):
            if each is not None and len(each) != n:
                raise ValueError(f"got {len(each)} for {n} params; expected one for each")
        self._reserve(n)
        self._owners += (params, grads, axs, scalars)
        try:
            for i in range(n):
                if partial and grads[i] is None:
                    continue
                row = self._append(first + i, params[i])
                if grads is not None:
                    self._take(GRAD, grads[i])
                    row.grad = data_of(&self._borrowed[self.n_rows - 1][GRAD].tensor)
                if axs is not None:
                    self._take(AX, axs[i])
                    row.ax = data_of(&self._borrowed[self.n_rows - 1][AX].tensor)
                row.eta = eta
                row.mu = mu
                row.scalars = NULL
                if scalars is not None:
                    row.scalars = <Scalars *>&scalars[i, 0]
                    row.eta = lr if row.scalars.step == 0 else row.scalars.eta
                    row.mu = row.scalars.mu
                row.decay = 1.0 - lambd * row.eta
                row.weight_decay = weight_decay
                row.grad_scale = grad_scale
                row.lr = lr
                row.lambd = lambd
                row.alpha = alpha
                row.t0 = t0
        except BaseException:
            self._clear()
            raise

    def check_overlap(self):
        """Check that nothing which is written shares memory with anything else in the table.

        Raises
        ------
        ValueError
            Two arrays share memory and at least one of them is written, or a param is listed twice.
        """
        cdef Py_ssize_t n = 0, row
        cdef int role
        cdef DLTensor *tensor
        cdef Span *spans = <Span *>malloc(max(1, 3 * self.n_rows) * sizeof(Span))
        if spans == NULL:
            raise MemoryError
        try:
            for row in range(self.n_rows):
                if self.rows[row].n == 0:
                    continue
                for role in range(3):
                    if _address(&self.rows[row], role) == NULL:
                        continue
                    tensor = &self._borrowed[row][role].tensor
                    spans[n].start = <uintptr_t>_address(&self.rows[row], role)
                    spans[n].stop = spans[n].start + self.rows[row].n * (tensor.dtype.bits // 8)
                    spans[n].row = row
                    spans[n].role = role
                    n += 1
            qsort(spans, n, sizeof(Span), _by_start)
            _refuse_overlaps(self, spans, n)
        except ValueError:
            self._clear()
            raise
        finally:
            free(spans)

    cdef int _reserve(self, Py_ssize_t more) except -1:
        cdef Py_ssize_t needed = self.n_rows + more
        if needed <= self._capacity:
            return 0
        cdef void *rows = realloc(self.rows, needed * sizeof(Row))
        if rows == NULL:
            raise MemoryError
        self.rows = <Row *>rows
        cdef void *borrowed = realloc(self._borrowed, needed * sizeof(self._borrowed[0]))
        if borrowed == NULL:
            raise MemoryError
        self._borrowed = <Borrowed (*)[3]>borrowed
        self._capacity = needed
        return 0

    cdef Row *_append(self, Py_ssize_t index, param) except NULL:
        cdef Row *row = &self.rows[self.n_rows]
        cdef Borrowed *borrowed = &self._borrowed[self.n_rows][0]
        cdef int role
        for role in range(3):
            borrowed[role].versioned = NULL
            borrowed[role].legacy = NULL
        row.index = index
        row.grad = NULL
        row.ax = NULL
        self.n_rows += 1  # from here on __dealloc__ gives back what was borrowed
        self._take(PARAM, param)
        row.param = data_of(&borrowed[PARAM].tensor)
        row.n = size_of(&borrowed[PARAM].tensor)
        row.dtype = borrowed[PARAM].tensor.dtype
        return row

    cdef int _take(self, int role, object array) except -1:
        """Borrow one array of the last row, and check it alone and against the row's param."""
        cdef Py_ssize_t row = self.n_rows - 1
        try:
            borrow(array, role != GRAD, &self._borrowed[row][role])
            self._check_alone(role)
            if role != PARAM:
                self._check_match(role)
        except (TypeError, ValueError, BufferError) as error:
            kind = next(k for k in (BufferError, TypeError, ValueError) if isinstance(error, k))
            raise kind(f"{self._name(role, row)}: {error}") from error.__cause__
        return 0

    cdef int _check_alone(self, int role) except -1:
        cdef DLTensor *tensor = &self._borrowed[self.n_rows - 1][role].tensor
        cdef DLDataType dtype = tensor.dtype
        if dtype.code != kDLFloat or dtype.lanes != 1 or dtype.bits not in (32, 64):
            raise ValueError(
                f"dtype {dtype_name(dtype)} is not supported; expected float32 or float64")
        if tensor.device.device_type not in (kDLCPU, kDLCUDAHost, kDLROCMHost):
            raise ValueError(
                f"device {device_name(tensor)} is not supported; expected an array in CPU memory")
        if size_of(tensor) and tensor.data == NULL:
            raise ValueError("its elements have no memory (the address is NULL)")
        if not is_dense(tensor):
            raise ValueError(
                f"strides {strides_of(tensor)} of shape {shape_of(tensor)} leave gaps or repeat "
                "elements; expected a contiguous array, in C, Fortran or any other axis order")
        if size_of(tensor) and <uintptr_t>data_of(tensor) % (dtype.bits // 8):
            raise ValueError(
                f"address {<uintptr_t>data_of(tensor):#x} is not a multiple of its "
                f"{dtype.bits // 8}-byte elements; expected aligned memory")
        return 0

    cdef int _check_match(self, int role) except -1:
        cdef DLTensor *tensor = &self._borrowed[self.n_rows - 1][role].tensor
        cdef DLTensor *param = &self._borrowed[self.n_rows - 1][PARAM].tensor
        if tensor.dtype.bits != param.dtype.bits:
            raise ValueError(self._mismatch(
                "dtype", dtype_name(tensor.dtype), dtype_name(param.dtype)))
        if not same_shape(tensor, param):
            raise ValueError(self._mismatch("shape", shape_of(tensor), shape_of(param)))
        if not same_layout(tensor, param):
            raise ValueError(self._mismatch(
                "strides", strides_of(tensor), strides_of(param)))
        return 0

    cdef str _mismatch(self, str what, got, wanted):
        param = self._name(PARAM, self.n_rows - 1)
        return f"{what} {got} does not match {param} of {what} {wanted}"

    cdef str _name(self, int role, Py_ssize_t row):
        return self._names[role].format(self.rows[row].index)


cdef int _refuse_overlaps(Table table, Span *spans, Py_ssize_t n) except -1:
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


cdef int _by_start(const void *one, const void *other) noexcept nogil:
    cdef uintptr_t a = (<const Span *>one).start, b = (<const Span *>other).start
    return (a > b) - (a < b)


cdef const void *_address(const Row *row, int role) noexcept:
    if role == PARAM:
        return row.param
    return row.grad if role == GRAD else row.ax
