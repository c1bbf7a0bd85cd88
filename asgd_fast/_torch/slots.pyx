"""The rows of a torch optimizer's step, gathered in C from its groups and its state.

This module knows groups and state as torch lays them out, and reads them; it does not import torch,
and creates or converts nothing: what cannot go to an engine as it is, it hands back.
"""

from cpython.dict cimport PyDict_Next
from cpython.exc cimport PyErr_Clear
from cpython.object cimport PyObject, PyTypeObject, descrgetfunc
from libc.math cimport INFINITY, NAN, isfinite, isnan
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memset

from asgd_fast._rows.dlpack cimport (
    Borrowed,
    DLPackExchangeAPI,
    Known,
    borrow,
    exchange_api_of,
    forget,
    give_back,
    is_known,
    kDLComplex,
    know,
    stream_of,
)
from asgd_fast._schedule cimport Plan, Scalars, decay_of, scalars_after
from asgd_fast._rows.rows cimport AX, CPU, GRAD, PARAM, OnDevice, Row, Rows
from asgd_fast._rows.describe cimport data_of

from asgd_fast.schedule import check_average_every, check_lr_schedule, check_scalar


cdef extern from *:
    """
    #if PY_VERSION_HEX < 0x030C0000  /* dictionaries then counted their changes, all together */
    #define asgd_fast_version_of(dict) (((PyDictObject *)(dict))->ma_version_tag)
    #else
    #define asgd_fast_version_of(dict) 0
    #endif
    """
    uint64_t _version_of_dict "asgd_fast_version_of"(PyObject *dictionary) noexcept


cdef class Slot:
    """A param with its state, and the place of its scalars.

    Parameters
    ----------
    param : Tensor
    state : dict
        The param's own; exactly a dict if there is a block. An entry "t0" overrules the group's.
    block : Tensor of shape (n, 3), optional
        Row `place` holds step, eta and mu, of which the state's are views: the state then begins
        with "step", "eta", "mu" and "ax", in this order. Without a block the scalars are tensors of
        their own, and the slot is not for an engine.
    place : int
    lazy_at : int
        The address of the param if its average is the same memory, until the first step that
        averages; else 0.
    on_device : bool
        Whether the block is in the memory of a GPU, which advances the scalars. The block then has
        a row of zeros at its end.
    steps : float
        How many steps the param has made.

    Attributes
    ----------
    is_on_gpu : bool
        Whether the param was there when it was last seen.
    at_most : float
        How many steps it has made at most: the GPU skips those of infinite gradients.
    """

    cdef readonly object param, state
    cdef readonly bint is_lazy
    cdef readonly bint on_device
    cdef readonly double at_most
    cdef readonly bint is_on_gpu
    cdef object _block, _ax
    cdef Py_ssize_t _place
    cdef double _t0             # nan: the group's holds
    cdef tuple _tensors
    cdef PyObject *_held[4]     # the same
    cdef object _references     # for which see `Slots`
    cdef object _version
    cdef const void *_address   # of the param whose version that is
    cdef uint64_t _state_version  # when the state last was whole; 0 where Python does not tell
    cdef bint _is_detached      # a scalar is no longer a view of its place
    cdef Known _known_grad

    def __cinit__(
        self, param, state, block=None, Py_ssize_t place=0, uintptr_t lazy_at=0,
        bint on_device=False, double steps=0,
    ):
        self.on_device = on_device
        self.is_on_gpu = param.is_cuda
        self.at_most = steps
        self.param = param
        self.state = state
        self.is_lazy = lazy_at != 0
        self._address = <const void *>lazy_at
        self._block = block
        self._place = place
        self.read_start()
        if block is not None:
            self._hold()

    def __dealloc__(self):
        forget(&self._known_grad)

    cdef int _hold(self) except -1:
        """Take note of the tensors that the state holds."""
        self._ax = self.state["ax"]
        self._tensors = tuple(self.state.values())[:4]
        for i in range(4):
            self._held[i] = <PyObject *>self._tensors[i]
        self._state_version = 0
        return 0

    def read_start(self):
        """Read the entry "t0" of the state, which may have changed."""
        self._t0 = self.state.get("t0", NAN)

    @property
    def packed(self):
        """Whether the scalars have a place in a block."""
        return self._block is not None

    @property
    def average(self):
        """The average that the state held when it last was whole; None without a block."""
        return self._ax

    def is_whole(self):
        """Whether the state still holds the tensors that it held."""
        return self._is_whole()

    cdef inline bint _is_whole(self) noexcept:
        # Walked: four look-ups would take three times as long.
        cdef Py_ssize_t position = 0
        cdef int i
        cdef PyObject *value
        cdef uint64_t version
        if self._block is None:
            return True
        if self._is_detached:
            return False
        version = _version_of_dict(<PyObject *>self.state)
        if version != 0 and version == self._state_version:
            return True
        for i in range(4):
            if not PyDict_Next(self.state, &position, NULL, &value) or value != self._held[i]:
                return False
        self._state_version = version
        return True


# The lr_schedule of torch.
cdef str TORCHS = "torch"

# How many params' scalars each step asks in turn; 4 take half a microsecond.
cdef enum:
    ASKED_IN_TURN = 4

# What the rows of one group have in common, and what is known from the row before.
cdef struct Common:
    Plan plan
    double weight_decay
    double grad_scale   # negative to maximize
    bint round_scalars
    Scalars now         # of the row
    Scalars next        # after the step: often those of the next row too,
    double next_of      # if that has made as many steps; nan: of no other row
    PyObject *written   # the block that is listed as written
    PyObject *block     # of which the rest is known
    char *address
    bint double_scalars
    int device          # which GPU has the block
    void *ticket        # behind the scalars of a block there
    const void *lr_on_device  # where a GPU has lr; NULL: with the host
    int lr_device
    bint double_lr
    bint on_device      # whether scalars of params on a GPU are to be there


cdef class Slots:
    """The slots of an optimizer's params, for as long as its groups and its state stay as they are.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    groups : list of list of (Slot or None)
        For each param of each group its slot, or None where it has no state.
    tensor, parameter : type
        The types of tensor whose memory may be used: exactly these, as a subclass may mean
        anything.
    eta_after : callable
        eta after a number of steps where lr is a tensor: of (lr, lambd, alpha, step), a float.
    version_of : callable
        Of a tensor; a tensor without memory that shares its version counter.
    refer : callable
        Of a tensor; an object through which torch itself refers to it.
    alias : callable
        Of a tensor; another one of the same memory, which is its average as long as that is lazy.

    Notes
    -----
    A tensor that nothing but Python refers to costs torch 33 ns more at each use, as it then takes
    the GIL and a reference. So what is written is referred to from within torch: the averages, and
    for the params, which belong to others, what shares their version counters.
    """

    cdef readonly list groups
    cdef readonly list written
    cdef readonly bint all_on_device  # whether all scalars are
    cdef object _tensor, _parameter, _eta_after, _version_of, _refer, _alias, _grad, _is_neg
    cdef descrgetfunc _get
    cdef list _keys, _values
    cdef list _packed               # the slots with a place in a block
    cdef list _leaders              # those of them that come first in their group or block
    cdef Py_ssize_t _turn           # which of them is looked at in the next step
    cdef DLPackExchangeAPI *_api
    cdef Py_ssize_t _n_written

    def __cinit__(
        self, state, list groups, tensor, parameter, eta_after, version_of, refer, alias,
    ):
        self.groups = groups
        self._tensor = tensor
        self._parameter = parameter
        self._eta_after = eta_after
        self._version_of = version_of
        self._refer = refer
        self._alias = alias
        self._grad = tensor.grad
        property_type = type(self._grad)
        self._get = (<PyTypeObject *>property_type).tp_descr_get
        self._is_neg = tensor.is_neg
        self.written = []
        self._packed = []
        self._leaders = []
        for own in groups:
            packed = [slot for slot in own if slot is not None and slot.packed]
            self._packed += packed
            self._leaders += [slot for i, slot in enumerate(packed) if i == 0 or _leads(slot)]
        self.all_on_device = all([
            slot is None or slot.on_device for own in groups for slot in own])
        self._keys = list(state.keys())
        self._values = list(state.values())
        self._api = exchange_api_of(tensor)

    def is_current(self, state):
        """Whether the state holds the same dicts for the same params as when it was read."""
        # Walked rather than looked up: the hash of a tensor is computed in Python.
        cdef Py_ssize_t position = 0, i = 0
        cdef PyObject *key
        cdef PyObject *value
        if not isinstance(state, dict) or len(state) != len(self._keys):
            return False
        while PyDict_Next(state, &position, &key, &value):
            if key != <PyObject *>self._keys[i] or value != <PyObject *>self._values[i]:
                return False
            i += 1
        return True

    def gather(
        self, Rows table, groups, double unscale, bint round_scalars, bint on_device=False,
    ):
        """Add a row for each param that has a grad, as far as an engine can take it.

        Afterwards `written` lists what the engine will write, as far as autograd is concerned.

        Parameters
        ----------
        table : Rows
            Empty.
        groups : list of dict
            The optimizer's param_groups.
        unscale : float
            What the grads are multiplied by first.
        round_scalars : bool
            Round eta and mu to float32, as torch does where that is its default dtype.
        on_device : bool
            Whether scalars of params on a GPU are to be in its memory, as in groups with
            capturable=True.

        Returns
        -------
        list of (dict, Slot), or None
            The slots left out, with their groups; None if the slots are out of date, or averages
            are to have memory of their own before the step.

        Raises
        ------
        ValueError
            A group was changed to what `check_group` refuses, or its lr to something so negative
            that eta has no value.
        """
        cdef list left = [], slots
        cdef bint by_torch, capturable
        cdef object lr = None
        cdef Slot slot
        cdef Common common
        cdef Py_ssize_t i
        cdef list params
        memset(&common, 0, sizeof(common))
        self._n_written = 0
        if len(groups) != len(self.groups) or not self._are_attached():
            return None
        for group, slots in zip(groups, self.groups):
            params = group["params"] if type(group["params"]) is list else list(group["params"])
            if len(params) != len(slots):
                return None
            table.reserve(len(slots))
            by_torch = group["differentiable"]
            capturable = group["capturable"]
            if by_torch:
                check_group(group)
            else:
                lr = self._lr_of(group)
                common = self._common_of(group, lr, unscale, round_scalars)
                common.on_device = on_device or capturable
            for i in range(len(slots)):
                if i >= len(params):  # shortened meanwhile
                    return None
                param = params[i]
                grad = self._grad_of(param)
                if grad is None:
                    continue
                slot = slots[i]
                if slot is None or slot.param is not param or not slot._is_whole():
                    return None
                if by_torch or slot._block is None or (capturable and not slot.is_on_gpu):
                    left.append((group, slot))
                    continue
                if slot.on_device:
                    if not common.on_device:
                        return None
                    self._expect(slot, &common)
                else:
                    if common.on_device and slot.is_on_gpu:
                        return None
                    self._schedule(slot, &common, lr)
                # The step makes the first iterate of the average, or a later one; or may be part of
                # a graph, whose steps go on where no host sees them.
                if slot.is_lazy and (capturable or common.now.mu != 1 or common.next.mu != 1):
                    return None
                if not self._add(table, slot, grad, &common):
                    left.append((group, slot))
        del self.written[self._n_written:]
        return left

    def add(self, Rows table, group, Slot slot, grad, double unscale, bint round_scalars):
        """Add the row of one param with a grad that is not its own, after `gather`.

        Returns
        -------
        bool
            Whether an engine can take it.
        """
        lr = self._lr_of(group)
        cdef Common common = self._common_of(group, lr, unscale, round_scalars)
        if slot._block is None:
            return False
        table.reserve(1)
        if slot.on_device:
            self._expect(slot, &common)
        else:
            self._schedule(slot, &common, lr)
        return self._add(table, slot, grad, &common)

    cdef bint _add(self, Rows table, Slot slot, grad, Common *common) except -1:
        """Add the row of a slot with a block, after `_schedule`."""
        # Which weight the device has is not known here.
        cdef bint averages = not slot.is_lazy and (slot.on_device or common.now.mu != 0)
        cdef Row *row = table.begin(0)
        if not (
            self._lend(table, PARAM, slot.param)
            and self._lend(table, GRAD, grad)
            and (not averages or self._lend(table, AX, slot._ax))
        ) or self._has_lazy_sign(slot, grad, row):
            table.abandon()
            return False
        if common.written != common.block:
            self._write(slot._block)
            common.written = common.block
        if (row.param != slot._address or slot._version is None) and (
                not self._renew(slot, row.param)):
            table.abandon()
            return False
        slot.is_on_gpu = row.device != CPU
        if slot.on_device and row.device != common.device:
            slot._is_detached = True  # from its scalars, which have stayed where it was
            table.abandon()
            return False
        if slot.on_device and common.lr_on_device != NULL and row.device != common.lr_device:
            table.abandon()
            return False
        if row.device != table.device and row.device != CPU:  # all of torch's on one stream there
            table.note_stream(stream_of(slot.param, row.device))
        if slot.on_device:
            _set_scalars_on_device(row, table.put_on_device(), slot, common)
            slot.at_most += 1
        else:
            _set_scalars(row, slot, common)
        table.commit(grad)
        self._write(slot._version)
        if averages:
            self._write(slot._ax)
        return True

    cdef bint _are_attached(self) except -1:
        """Whether the scalars still are views of the blocks, and lazy averages of their params.

        The engine writes these without asking. To ask all would take half as long as the rest, so
        each step asks a few in turn, and the first of each group and block: what moves a state
        elsewhere moves that of a model, or of a part. If one is found detached, all are marked.
        """
        cdef Slot slot
        cdef Common common
        cdef Py_ssize_t _i, n = len(self._packed)
        cdef bint attached = True
        memset(&common, 0, sizeof(common))
        if n > ASKED_IN_TURN:  # else all have their turn
            for slot in self._leaders:
                attached = attached and self._is_attached(slot, &common)
        for _i in range(min(n, <Py_ssize_t>ASKED_IN_TURN)):
            self._turn = (self._turn + 1) % n
            attached = attached and self._is_attached(self._packed[self._turn], &common)
        if not attached:
            self.mark_detached()
        return attached

    def mark_detached(self):
        """Ask all, so that no slot that is detached stays whole."""
        cdef Slot slot
        cdef Common common
        memset(&common, 0, sizeof(common))
        for slot in self._packed:
            self._is_attached(slot, &common)

    cdef bint _is_attached(self, Slot slot, Common *common) except -1:
        cdef Borrowed borrowed
        cdef int i
        cdef bint lent
        if <PyObject *>slot._block != common.block:
            self._find(slot._block, common)
        for i in range(3):
            lent = self._export(slot._tensors[i], True, &borrowed)
            if lent:
                give_back(&borrowed)
            if not lent or <char *>data_of(&borrowed.tensor) != common.address + (
                    3 * slot._place + i) * (8 if common.double_scalars else 4):
                slot._is_detached = True
                return False
        if slot.is_lazy:
            lent = self._export(slot._ax, True, &borrowed)
            if lent:
                give_back(&borrowed)
            if not lent or data_of(&borrowed.tensor) != slot._address:
                slot._is_detached = True
                return False
        return True

    cdef object _lr_of(self, group):
        lr = group["lr"]
        return lr.detach() if isinstance(lr, self._tensor) else lr

    cdef bint _renew(self, Slot slot, const void *address) except -1:
        """Take note of a param that is new, or whose memory is: it may be another tensor now.

        False if a lazy average cannot follow, as the param has another dtype or layout.
        """
        if slot.is_lazy:
            if not same_kind(slot._ax, slot.param):
                return False
            slot.state["ax"] = self._alias(slot.param)
            slot._hold()
        slot._version = self._version_of(slot.param)
        slot._references = (self._refer(slot._version), self._refer(slot._ax))
        slot._address = address
        return True

    cdef inline object _grad_of(self, param):
        """The same as param.grad, in fewer steps for the usual types."""
        kind = type(param)
        if kind is not self._parameter and kind is not self._tensor:
            return param.grad
        return self._get(self._grad, param, kind)

    cdef inline int _write(self, tensor) except -1:
        """List a tensor as written, where it usually stands since the step before."""
        if self._n_written < len(self.written) and self.written[self._n_written] is tensor:
            self._n_written += 1
            return 0
        del self.written[self._n_written:]
        self.written.append(tensor)
        self._n_written += 1
        return 0

    cdef bint _lend(self, Rows table, int role, tensor) except -1:
        cdef Borrowed *borrowed = &table.arrays[role]
        if type(tensor) is not self._tensor and type(tensor) is not self._parameter:
            return False
        if not self._export(tensor, role != GRAD, borrowed):
            return False
        if table.settle(role) is not None:
            return False
        # The exchange API lends the memory before a pending conjugation.
        return not (borrowed.tensor.dtype.code == kDLComplex and tensor.is_conj())

    cdef bint _export(self, tensor, bint writing, Borrowed *borrowed) except -1:
        """Borrow a tensor, which may require grad; False if it has no memory to lend."""
        cdef Known known
        if self._api != NULL:
            borrowed.versioned = NULL
            borrowed.legacy = NULL
            if self._api.dltensor_from_py_object_no_sync(<PyObject *>tensor, &borrowed.tensor) != 0:
                PyErr_Clear()
                return False
        else:
            try:
                memset(&known, 0, sizeof(known))
                borrow(tensor.detach(), writing, borrowed, &known, None)
                forget(&known)
            except (BufferError, TypeError, ValueError):
                return False
        return True

    cdef bint _has_lazy_sign(self, Slot slot, grad, const Row *row) except -1:
        """Whether the memory of any of the tensors holds the values before a negation.

        Torch takes 70 ns to tell, so a tensor is asked once, until it has other memory.
        """
        if not is_known(&slot._known_grad, grad, row.grad):
            if self._is_neg(grad):
                return True
            know(&slot._known_grad, grad, row.grad)
        return (row.param != slot._address or slot._version is None) and (
            self._is_neg(slot.param) or self._is_neg(slot._ax))

    cdef int _expect(self, Slot slot, Common *common) except -1:
        """Look up where a device has the scalars of a slot, and compute the latest they may be."""
        cdef Plan plan = _plan_of(slot, common)
        if <PyObject *>slot._block != common.block:
            self._find(slot._block, common)
        if slot.is_lazy:
            common.now = scalars_after(slot.at_most, &plan)
            common.next = scalars_after(slot.at_most + 1, &plan)
            common.next_of = NAN
        return 0

    cdef int _schedule(self, Slot slot, Common *common, lr) except -1:
        """Look up the scalars of a slot with a block, and compute those after its next step."""
        cdef double *doubles
        cdef float *floats
        cdef Plan own
        if <PyObject *>slot._block != common.block:
            self._find(slot._block, common)
        if isnan(common.plan.lr):
            common.plan.lr = number("lr", lr)  # of a device: waits for it
        if common.double_scalars:
            doubles = <double *>common.address + 3 * slot._place
            common.now.step, common.now.eta, common.now.mu = doubles[0], doubles[1], doubles[2]
        else:
            floats = <float *>common.address + 3 * slot._place
            common.now.step, common.now.eta, common.now.mu = floats[0], floats[1], floats[2]
        if not isnan(slot._t0):
            own = _plan_of(slot, common)
            self._advance(&own, common, lr)
            common.next_of = NAN
        elif common.next_of != common.now.step:
            common.next_of = NAN
            self._advance(&common.plan, common, lr)
            common.next_of = common.now.step
        return 0

    cdef int _advance(self, const Plan *plan, Common *common, lr) except -1:
        """Compute the scalars after one step more, rounded as torch rounds them."""
        cdef double step = common.now.step + 1
        if not common.double_scalars:
            step = <float>step
        common.next = scalars_after(step, plan)
        if isinstance(lr, self._tensor) and not plan.current:
            common.next.eta = self._eta_after(lr, plan.lambd, plan.alpha, step)
        elif plan.lr < 0 and not isfinite(common.next.eta):
            raise ValueError(
                f"Invalid learning rate: {lr} (1 + lambd * lr * step must stay above 0)")
        elif common.round_scalars:
            common.next.eta = <float>common.next.eta
        if common.round_scalars:
            common.next.mu = <float>common.next.mu
        return 0

    cdef int _find(self, block, Common *common) except -1:
        """Look up where a block is. Not kept over steps: sharing it with a process moves it."""
        cdef Borrowed borrowed
        lent = self._export(block, True, &borrowed)
        if lent:
            give_back(&borrowed)  # the block itself keeps its memory
        if not lent or borrowed.tensor.data == NULL:
            raise RuntimeError("state: the memory of step, eta and mu was taken away")
        common.address = <char *>data_of(&borrowed.tensor)
        common.double_scalars = borrowed.tensor.dtype.bits == 64
        common.device = borrowed.tensor.device.device_id
        common.ticket = common.address + (
            3 * (borrowed.tensor.shape[0] - 1) * (borrowed.tensor.dtype.bits // 8))
        common.block = <PyObject *>block
        return 0

    cdef Common _common_of(self, group, lr, double unscale, bint round_scalars) except *:
        cdef Common common
        cdef Borrowed borrowed
        memset(&common, 0, sizeof(common))
        check_group(group)
        if (
            isinstance(lr, self._tensor) and lr.is_cuda
            and lr.is_floating_point() and lr.itemsize >= 4
            and self._export(lr, False, &borrowed)
        ):
            give_back(&borrowed)  # the group keeps it
            common.plan.lr = NAN
            common.lr_on_device = data_of(&borrowed.tensor)
            common.lr_device = borrowed.tensor.device.device_id
            common.double_lr = borrowed.tensor.dtype.bits == 64
        else:
            common.plan.lr = number("lr", lr)
        common.plan.lambd = group["lambd"]
        common.plan.alpha = group["alpha"]
        common.plan.t0 = group["t0"]
        common.plan.average_every = group["average_every"]
        common.plan.current = group["lr_schedule"] != TORCHS
        common.weight_decay = number("weight_decay", group["weight_decay"])
        common.grad_scale = -unscale if group["maximize"] else unscale
        common.round_scalars = round_scalars
        common.next_of = NAN
        return common


cdef inline void _set_scalars(Row *row, Slot slot, const Common *common) noexcept:
    """Set the row's scalars, of now and after the step."""
    cdef Plan plan
    row.scalars = common.address + 3 * slot._place * (8 if common.double_scalars else 4)
    row.double_scalars = common.double_scalars
    row.weight_decay = common.weight_decay
    row.grad_scale = common.grad_scale
    row.eta = common.now.eta
    row.mu = common.now.mu
    row.next = common.next
    if common.plan.current:
        plan = _plan_of(slot, common)
        row.eta = scalars_after(common.now.step, &plan).eta
        row.decay = decay_of(row.eta, common.now.step, &plan)
    else:
        row.decay = 1.0 - common.plan.lambd * row.eta


cdef inline void _set_scalars_on_device(
    Row *row, OnDevice *own, Slot slot, const Common *common,
) noexcept:
    own.scalars = common.address + 3 * slot._place * (8 if common.double_scalars else 4)
    own.ticket = common.ticket
    own.plan = _plan_of(slot, common)
    own.lr = common.lr_on_device
    own.double_lr = common.double_lr
    row.double_scalars = common.double_scalars
    row.weight_decay = common.weight_decay
    row.grad_scale = common.grad_scale


cdef inline Plan _plan_of(Slot slot, const Common *common) noexcept:
    cdef Plan plan = common.plan
    if not isnan(slot._t0):
        plan.t0 = slot._t0
    return plan


cdef bint _leads(Slot slot) noexcept:
    return slot._place == 0


def same_kind(ax, param):
    """Whether an average has the dtype and the layout of its param.

    Parameters
    ----------
    ax, param : Tensor

    Returns
    -------
    bool
    """
    return ax.dtype == param.dtype and ax.shape == param.shape and ax.stride() == param.stride()


def check_group(group):
    """Refuse hyperparameters that torch lets through or does not know.

    Parameters
    ----------
    group : dict

    Raises
    ------
    TypeError, ValueError
        lambd, alpha or t0 is no finite number, or one of the first two is negative; lr_schedule or
        average_every is not what it may be, or goes with differentiable=True.
    """
    for name, low in (("lambd", 0.0), ("alpha", 0.0), ("t0", -INFINITY)):
        value = group[name]
        if type(value) is not float or not isfinite(value) or value < low:
            check_scalar(name, value, low=low)
    lr_schedule, every = group["lr_schedule"], group["average_every"]
    if lr_schedule is TORCHS and type(every) is int and every == 1:
        return
    check_lr_schedule(lr_schedule)
    check_average_every(every)
    if group["differentiable"] and (lr_schedule != TORCHS or every != 1):
        raise ValueError(
            "differentiable: goes only with lr_schedule='torch' and average_every=1")


def number(str name, value):
    """A hyperparameter as a float, of any size, as torch takes it.

    Parameters
    ----------
    name : str
        What the message calls it.
    value : float or Tensor
        Of one element.

    Returns
    -------
    float

    Raises
    ------
    TypeError
        `value` is no real number.
    """
    if type(value) is float:
        return value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a real number, got {value!r}") from error
