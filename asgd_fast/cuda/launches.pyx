"""The rows of a step as the words that the kernels of a GPU are launched with.

This module knows rows and words; it does not know how kernels are compiled or launched.

A launch has its words by value, among the kernel's parameters: nothing is copied to the GPU, or is
kept there for the next step, or must outlive a captured graph; and what is packed for one launch is
free for the next. First comes a header, then the rows, then the scalars of each set of rows that
have the same. Each row's work is cut into chunks, one for a block of threads.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memmove

from asgd_fast._rows.rows cimport BFLOAT16, CPU, FLOAT16, FLOAT32, FLOAT64, Row, Rows
from asgd_fast.cuda.scalars cimport DeviceRows, DeviceRow

# The kernel's parameters are one block of 64-bit words: a header, the rows, and the sets of scalars
# from the last one to the first.
#
#     0        HEADER    HEADER + row_words                       SETS_AT
#     +--------+---------+---------+-----+-----------+-----+-------+-------+
#     | header | row 0   | row 1   | ... | row n - 1 | ... | set 1 | set 0 |
#     +--------+---------+---------+-----+-----------+-----+-------+-------+
#
#     header    N_ROWS  N_CHUNKS  CHUNK  SETS  JOB  TICKET  LOSS_SCALE  FOUND_INF
#     row       param  grad  ax  PLACE  [SCALARS]
#     PLACE     | 63: 0 | 62 ... 48: set | 47 ... 31: tail | 30 ... 0: first chunk |
#     set       NEG_ETA  DECAY  WEIGHT_DECAY  FACTOR  MU  HOW
#       or      [LR  LAMBD  ALPHA  T0  EVERY  EMA_DECAY  POWER  L2  SIGN  FLAGS]
#
# What stands in brackets is there if the scalars are on the device. Row i has the chunks, and the
# blocks of threads, from its first one up to that of row i + 1; its last one has `tail` numbers.
cpdef enum:  # the header
    N_ROWS_AT = 0
    N_CHUNKS_AT = 1
    CHUNK_AT = 2         # the numbers of a chunk, but for the last one of each row
    SETS_AT = 3          # where set 0 is
    JOB_AT = 4
    TICKET_AT = 5        # addresses, for scalars on the device: where blocks draw tickets,
    LOSS_SCALE_AT = 6    # the loss scale, and whether gradients are infinite; the last two or 0
    FOUND_INF_AT = 7
    HEADER = 8

cpdef enum:  # a row, which begins with the addresses of param, grad and average (0: none is kept)
    PLACE_AT = 3
    SCALARS_AT = 4       # the address of step, eta and mu
    ROW = 4
    DEVICE_ROW = 5
    FIRST_BITS = 31      # as many blocks as CUDA has at most
    TAIL_BITS = 17
    SET_SHIFT = 48
    MOST_SETS = 1 << 15  # so that a place is never negative

cpdef enum:  # a set that the host knows, in the dtype that is computed in (mu: of the average)
    NEG_ETA_AT = 0
    DECAY_AT = 1
    WEIGHT_DECAY_AT = 2
    FACTOR_AT = 3        # of the gradient
    MU_AT = 4
    HOW_AT = 5           # one of the next three, and whether there is weight decay
    SET = 6
    NO_AVERAGE = 0
    COPY = 1
    AVERAGE = 2
    SKIP = 3             # do nothing; only on the device
    PHASES = 3
    HAS_WEIGHT_DECAY = 4

cpdef enum:  # a set that scalars on the device follow from, double
    LR_AT = 0            # or its address
    LAMBD_AT = 1
    ALPHA_AT = 2
    T0_AT = 3
    EVERY_AT = 4
    EMA_DECAY_AT = 5
    POWER_AT = 6
    L2_AT = 7            # weight decay
    SIGN_AT = 8          # of the gradient
    FLAGS_AT = 9
    DEVICE_SET = 10
    SCALARS_ARE_DOUBLE = 1
    LR_IS_FLOAT = 2
    LR_IS_DOUBLE = 4
    IS_CURRENT = 8

cpdef enum:  # the jobs
    UPDATE = 0
    SWAP = 1
    COPY_GRAD = 2        # over the param
    KEEP = 3             # the param in the grad
    ASSIGN = 4           # the average to the param
    PUT_AVERAGE = 5      # exchange param and average; or keep the param and assign a wide average
    PUT_BACK = 6

cpdef enum:
    THREADS = 512        # of a block

# A chunk has so many numbers that a launch has enough blocks, in these bounds. In the smallest one
# each thread still has two accesses of 16 bytes to make; the largest one is still done in some 50
# us, so that the blocks end almost together. These are powers of two.
cdef enum:
    SMALLEST_CHUNK = 13
    LARGEST_CHUNK = 15   # less than TAIL_BITS

_DTYPES = {FLOAT16: "float16", BFLOAT16: "bfloat16", FLOAT32: "float32", FLOAT64: "float64"}


def row_words(bint device_scalars):
    """How many words a row has, with scalars on the device or not."""
    return DEVICE_ROW if device_scalars else ROW


def set_words(bint device_scalars):
    """How many words a set of scalars has."""
    return DEVICE_SET if device_scalars else SET


# What rows must have in common to go into one launch, as one number.
cdef inline int64_t _key_of(const Row *row) noexcept nogil:
    cdef int64_t device_scalars = row.device_row != 0
    return row.device | <int64_t>row.kind << 32 | <int64_t>row.ax_size << 36 | device_scalars << 40


def keys_of(Rows rows):
    """The kinds of launches that the rows need.

    Parameters
    ----------
    rows : Rows

    Returns
    -------
    list of int
        For `launch_kind` and `pack`.
    """
    cdef Py_ssize_t i
    cdef int64_t key, last = -1
    cdef list keys = []
    for i in range(rows.n_rows):
        if rows.rows[i].device == CPU:
            continue
        key = _key_of(&rows.rows[i])
        if key != last and key not in keys:
            keys.append(key)
        last = key
    return keys


def launch_kind(int64_t key):
    """What the rows of a key have in common.

    Parameters
    ----------
    key : int
        Of `keys_of`.

    Returns
    -------
    device : int
    param, average : str
        The dtypes.
    device_scalars : bool
        Whether the scalars are in the GPU's memory.
    """
    cdef int kind = key >> 32 & 15, ax_size = key >> 36 & 15
    param = _DTYPES[kind]
    wide = {4: "float32", 8: "float64"}
    average = param if ax_size == 2 else wide[ax_size]
    return key & 0xFFFFFFFF, param, average, bool(key >> 40)


def pack(
    Rows rows, int64_t key, Py_ssize_t start, uint64_t[::1] words, int job, int64_t n_blocks,
    uint64_t loss_scale=0, uint64_t found_inf=0,
):
    """Lay out a launch of so many rows of a key as find room.

    Parameters
    ----------
    rows : Rows
        Checked.
    key : int
        Of `keys_of`.
    start : int
        The row to begin with.
    words : uint64 array
        Overwritten; room for a header, a row and a set at least.
    job : int
    n_blocks : int
        How many blocks keep the GPU busy.
    loss_scale, found_inf : int
        Addresses, for scalars on the device; else 0.

    Returns
    -------
    stop : int
        The row to go on with; the number of rows after the last launch.
    n_chunks : int
        How many blocks to launch. 0 if there is nothing to do.
    n_words : int
        How many words are used.
    """
    cdef bint device_scalars = key >> 40
    cdef int row_size = DEVICE_ROW if device_scalars else ROW
    cdef int set_size = DEVICE_SET if device_scalars else SET
    cdef int power = _chunk_for(rows, key, n_blocks)
    cdef int64_t chunk = <int64_t>1 << power, n_chunks = 0, n_rows = 0, n_sets = 0, n
    words[TICKET_AT] = 0
    cdef int64_t room = words.shape[0] - HEADER, tail
    cdef bint is_new
    cdef uint64_t *row_at = &words[HEADER]
    cdef uint64_t now[DEVICE_SET]
    cdef uint64_t last[DEVICE_SET]
    cdef const Row *row
    cdef DeviceRows device_rows = rows.device_rows
    cdef Py_ssize_t i
    for i in range(start, rows.n_rows):
        row = &rows.rows[i]
        if row.device == CPU or _key_of(row) != key or (row.n == 0 and not device_scalars):
            continue
        if job == UPDATE:
            if device_scalars:
                _set_of_plan(&device_rows.rows[row.device_row - 1], now)
            else:
                _set_of(row, now)
        n = (row.n + chunk - 1) >> power
        is_new = n_sets == 0 or (job == UPDATE and not _are_same(now, last, set_size))
        if (
            room < row_size + (set_size if is_new else 0)
            or n_chunks + n >= <int64_t>1 << FIRST_BITS
            or (is_new and n_sets == MOST_SETS)
        ):
            break
        if is_new:
            # From the end, until it is known where the rows stop.
            room -= set_size
            n_sets += 1
            memcpy(last, now, set_size * sizeof(uint64_t))
            memcpy(&words[0] + words.shape[0] - n_sets * set_size, now,
                   set_size * sizeof(uint64_t))
        _set_addresses(row, row_at, job)
        tail = row.n - (n - 1) * chunk if n != 0 else 0
        row_at[PLACE_AT] = n_chunks | tail << FIRST_BITS | (n_sets - 1) << SET_SHIFT
        if device_scalars:
            row_at[SCALARS_AT] = <uint64_t>device_rows.rows[row.device_row - 1].scalars
            words[TICKET_AT] = <uint64_t>device_rows.rows[row.device_row - 1].ticket
        row_at += row_size
        room -= row_size
        n_rows += 1
        n_chunks += n
    else:
        i = rows.n_rows
    memmove(row_at, &words[0] + words.shape[0] - n_sets * set_size,
            n_sets * set_size * sizeof(uint64_t))
    words[N_ROWS_AT] = n_rows
    words[N_CHUNKS_AT] = n_chunks
    words[CHUNK_AT] = chunk
    words[SETS_AT] = HEADER + n_rows * row_size + (n_sets - 1) * set_size
    words[JOB_AT] = job
    words[LOSS_SCALE_AT] = loss_scale
    words[FOUND_INF_AT] = found_inf
    # Rows without elements too have scalars that are to be advanced.
    n_blocks = max(n_chunks, <int64_t>1) if n_rows != 0 else 0
    return i, n_blocks, HEADER + n_rows * row_size + n_sets * set_size


def run(list groups, success):
    """Make calls of the driver, each group between its first one and its last.

    They do not run Python code, so that no interrupt comes between them.

    Parameters
    ----------
    groups : list of tuple of callable
        Each returns a tuple that begins with a status. The first one of a group makes a context
        current, and the last one takes it away again.
    success : object
        The status of a call that has not failed. After another one no more are made, but for the
        last one of the group.

    Returns
    -------
    list of tuple
        What they returned.
    """
    cdef list results = []
    for group in groups:
        begin, *calls, end = group
        result = begin()
        results.append(result)
        if result[0] != success:
            break
        for call in calls:
            result = call()
            results.append(result)
            if result[0] != success:
                break
        results.append(end())
        if result[0] != success:
            break
    return results


cdef inline bint _are_same(const uint64_t *one, const uint64_t *other, int n) noexcept:
    # Word by word, as they were just written: memcmp would wait for that, 8 ns a row.
    cdef int i
    for i in range(n):
        if one[i] != other[i]:
            return False
    return True


cdef int _chunk_for(Rows rows, int64_t key, int64_t n_blocks) noexcept:
    cdef int64_t size = 0
    cdef int power = SMALLEST_CHUNK
    cdef Py_ssize_t i
    for i in range(rows.n_rows):
        if rows.rows[i].device != CPU and _key_of(&rows.rows[i]) == key:
            size += rows.rows[i].n
    while power < LARGEST_CHUNK and n_blocks << power < size:
        power += 1
    return power


cdef void _set_addresses(const Row *row, uint64_t *at, int job) noexcept:
    cdef bint keeps = job == KEEP
    at[0] = <uint64_t>row.grad if keeps else <uint64_t>row.param
    if job == ASSIGN:
        at[1] = <uint64_t>row.ax
    else:
        at[1] = <uint64_t>row.param if keeps else <uint64_t>row.grad
    at[2] = <uint64_t>row.ax


cdef void _set_of(const Row *row, uint64_t *now) noexcept:
    cdef bint is_double = row.kind == FLOAT64
    now[NEG_ETA_AT] = _bits(-row.step.eta, is_double)
    now[DECAY_AT] = _bits(row.step.decay, is_double)
    now[WEIGHT_DECAY_AT] = _bits(row.step.weight_decay, is_double)
    now[FACTOR_AT] = _bits(row.step.grad_scale, is_double)
    now[MU_AT] = _bits(row.step.mu, row.ax_size == 8)
    now[HOW_AT] = NO_AVERAGE if row.ax == NULL else COPY if row.step.mu == 1 else AVERAGE
    # As given: the rounded one may be 0, and fma(0, p, g) is not always g.
    if row.step.weight_decay != 0:
        now[HOW_AT] |= HAS_WEIGHT_DECAY


cdef void _set_of_plan(const DeviceRow *own, uint64_t *now) noexcept:
    now[LR_AT] = _bits(own.plan.lr, True)
    now[LAMBD_AT] = _bits(own.plan.lambd, True)
    now[ALPHA_AT] = _bits(own.plan.alpha, True)
    now[T0_AT] = _bits(own.plan.t0, True)
    now[EVERY_AT] = _bits(own.plan.average_every, True)
    now[EMA_DECAY_AT] = _bits(own.plan.ema_decay, True)
    now[POWER_AT] = _bits(own.plan.power, True)
    now[L2_AT] = _bits(own.plan.weight_decay, True)
    now[SIGN_AT] = _bits(own.plan.grad_scale, True)
    now[FLAGS_AT] = 0
    if own.double_scalars:
        now[FLAGS_AT] |= SCALARS_ARE_DOUBLE
    if own.plan.current:
        now[FLAGS_AT] |= IS_CURRENT
    if own.lr != NULL:
        now[LR_AT] = <uint64_t>own.lr
        now[FLAGS_AT] |= LR_IS_DOUBLE if own.double_lr else LR_IS_FLOAT


cdef inline uint64_t _bits(double x, bint is_double) noexcept:
    """The bits of a number in the dtype that is computed in."""
    cdef uint64_t word = 0
    cdef float rounded = <float>x
    if is_double:
        memcpy(&word, &x, sizeof(x))
    else:
        memcpy(&word, &rounded, sizeof(rounded))
    return word
