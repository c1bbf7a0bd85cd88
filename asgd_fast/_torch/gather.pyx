"""The rows of a torch optimizer's step, gathered from its groups, its gradients and its state.

This module knows groups and state as torch lays them out. It changes no value of either before all
of the step is known: see `Work.begin`. What no engine can take, it lists for torch's own function.
"""

from cpython.dict cimport PyDict_Next, PyDict_SetItem
from cpython.object cimport PyObject, PyTypeObject, descrgetfunc
from libc.math cimport INFINITY, NAN, fabs, isfinite, isnan

import torch

from asgd_fast._rows.describe cimport data_of
from asgd_fast._rows.dlpack cimport Borrowed, give_back, stream_of
from asgd_fast._rows.rows cimport AX, CPU, FLOAT32, GRAD, PARAM, Mirror, Row, Rows
from asgd_fast._schedule cimport Plan, Step, averages, mu_of, plan_of, rounded
from asgd_fast._torch.memory cimport borrow_tensor, is_ordinary
from asgd_fast._torch.parts cimport are_alike, is_dtensor, part_of
from asgd_fast._torch.record cimport Record
from asgd_fast.cuda.scalars cimport DeviceRows, DeviceScalars

from asgd_fast._torch.conversions import average_as_param, extent, grad_as_param
from asgd_fast._torch.distributed import redistributed
from asgd_fast._torch.groups import (
    OWN_HYPERPARAMETERS, check_group, number, read_by_steps, scalars_in_types,
)
from asgd_fast._torch.internals import is_watched
from asgd_fast._torch.record import SCALARS
from asgd_fast._torch.scalars import on_host, to_device, to_host
from asgd_fast._torch.state import ParamState, find, new_average

cdef object TENSOR = torch.Tensor

# The dtypes of a tensor as lr of which eta is computed here, with torch's bits.
cdef tuple _COMPUTED_DTYPES = (torch.float32, torch.float64)

cdef tuple _OWN = tuple(OWN_HYPERPARAMETERS)

# p.grad by its descriptor takes half the time.
cdef object _grad = TENSOR.grad
cdef object _kind_of_grad = type(_grad)
cdef descrgetfunc _get_grad = (<PyTypeObject *>_kind_of_grad).tp_descr_get


# What the rows of one group have in common.
cdef struct Common:
    Plan plan
    bint capturable
    bint in_types        # whether scalars are computed in types with another arithmetic than floats
    Step *computed       # the last step whose scalars were
    const void *lr_on_device  # where a GPU has lr; NULL: with the host
    int lr_device
    bint double_lr


cdef class Work:
    """What one step is to do.

    Attributes
    ----------
    rows : Rows
        For the engines; checked.
    remaining : list of (dict, Tensor, Tensor, ParamState)
        For torch's own function: params with their groups, gradients and states.
    written : list of Tensor
        What engines write and a graph of autograd may have.
    unscale : float
        What the gradients are multiplied by first.
    """

    cdef readonly double unscale
    cdef readonly Rows rows
    cdef readonly list remaining
    cdef readonly list written
    cdef object _state
    cdef dict _adopted       # somebody else's entries: see `find`
    cdef dict _new           # by ids of params: param, its state from this step on, what it had
    cdef list _stepped       # the states of the rows
    cdef list _averages      # averages that come into being with the step, each with its state
    cdef list _replaced      # states with tensors for what stands in the place of their scalars
    cdef list _converted     # gradients of which a copy is used
    cdef dict _redistributed  # gradients laid out as their params, by ids of these
    cdef object _group       # whose params are being added
    cdef object _lr          # of the group, as it stands there
    cdef object _scalars     # of the row, if its record is open: the tensors that an engine writes
    cdef object _settings
    cdef bint _scalars_on_device
    cdef bint _round_scalars
    cdef bint _shares_state  # one entry is the state of two params
    cdef Py_ssize_t _position  # in the state: see `_next`

    def __cinit__(self, state, settings, double unscale):
        self.unscale = unscale
        self.rows = Rows(("params[{}]", "grads[{}]", "averages[{}]"))
        self.remaining = []
        self.written = []
        self._state = state
        self._settings = settings
        self._scalars_on_device = settings.scalars_on_device
        self._round_scalars = torch.get_default_dtype() is not torch.float64
        self._new = {}
        self._adopted = {}
        self._averages = []
        self._replaced = []
        self._stepped = []
        self._converted = []
        self._redistributed = {}

    def begin(self):
        """Let the states and averages come into being that begin with this step: all or none.

        No Python code is run once anything has changed, so that there is no interrupt then.
        """
        cdef Record record
        cdef int i
        if self._new:
            self._put_states()
        for record, scalars in self._replaced:
            for i in range(3):
                PyDict_SetItem(record, SCALARS[i], scalars[i])
        for record, ax in self._averages:
            if record.average() is None:
                record.ax = ax
            else:
                record.average().data = ax
        if self.rows.device_rows is not None:
            self.rows.device_rows.count()

    cdef int _put_states(self) except -1:
        # Tensors hash in Python; the update of a dict by another one then takes these hashes.
        states = {param: record for param, record, _ in self._new.values()}
        try:
            self._state.update(states)
        except BaseException:  # no memory to grow
            for param, _, found in self._new.values():
                if found is None:
                    self._state.pop(param, None)
                else:
                    self._state[param] = found
            raise
        return 0

    def end(self):
        """Let states that another thread has looked at since they were gathered show the step."""
        cdef Record record
        for record in self._stepped:
            record.leave_step()

    def has_all_scalars_on_device(self):
        """Whether GPUs have the scalars of all rows."""
        cdef Py_ssize_t i
        for i in range(self.rows.n_rows):
            if self.rows.rows[i].device_row == 0:
                return False
        return True

    cdef int _add_group(self, group, bint by_torch) except -1:
        """Add the params of a group that have a gradient."""
        cdef Common common
        # As a dict itself, of which look-ups take half the time.
        cdef dict values = group if type(group) is dict else read_by_steps(group)
        cdef Record record
        cdef list params
        self._read_group(values, &common)
        by_torch = (
            by_torch or values["differentiable"]
            # A tensor, by which torch scales params in its own dtype.
            or common.in_types and isinstance(values["lambd"], TENSOR))
        # A copy: another thread may change the list, and room is made for these alone.
        params = list(values["params"])
        self.rows.begin_group(len(params))
        for param in params:
            grad = _grad_of(param)
            record = self._next(param)
            if grad is None:
                continue
            if record is None:
                record = self._find(param, group)
            if not by_torch and not is_ordinary(param):
                grad = self._laid_out(grad, param, &common.plan)
            if by_torch or not self._add(param, grad, record, &common):
                self.remaining.append((group, param, grad, record))
        return 0

    cdef object _laid_out(self, grad, param, const Plan *plan):
        """The gradient of a param, laid out as that if both are DTensors.

        All ranks communicate before anything is asked that they may answer differently, such as
        how the memory of their parts is laid out; torch's function gets the same gradient.
        """
        if is_dtensor(grad) and is_dtensor(param) and are_alike(grad, param):
            return grad
        # Where torch computes with the ranks' parts before it adds them, the bits are others.
        moved = redistributed(
            grad, param, sums=plan.weight_decay == 0 and fabs(plan.grad_scale) == 1)
        if moved is None:
            return grad
        self._redistributed[id(param)] = moved
        return moved

    cdef int _read_group(self, dict group, Common *common) except -1:
        """Read the hyperparameters of a group, which are checked, as far as the host has them."""
        cdef Borrowed borrowed
        lr, lambd, alpha, t0 = group["lr"], group["lambd"], group["alpha"], group["t0"]
        # To ask a number whether it is a tensor takes 80 ns.
        cdef bint is_tensor = not _is_plain(lr) and isinstance(lr, TENSOR)
        self._group = group
        self._lr = lr.detach() if is_tensor else lr
        common.lr_on_device = NULL
        common.plan = plan_of(
            NAN, lambd, alpha, t0, group.get("average_every", 1), group.get("averaging", "mean"),
            group.get("lr_schedule", "torch") != "torch")
        if is_tensor and not common.plan.current and lr.is_cpu and lr.dtype in _COMPUTED_DTYPES:
            if alpha != 0.5:  # a root, which torch leaves to a library of its own
                common.plan.lr_size = lr.itemsize
        common.in_types = not (
            (_is_plain(lr) or common.plan.lr_size)
            and _is_plain(lambd) and _is_plain(alpha) and _is_plain(t0))
        common.computed = NULL
        if is_tensor and lr.is_cuda:
            # The host reads it only where it has scalars: it would wait for the device.
            if lr.is_floating_point() and lr.itemsize >= 4 and borrow_tensor(
                    self._lr, False, &borrowed):
                give_back(&borrowed)  # the group keeps it
                common.lr_on_device = data_of(&borrowed.tensor)
                common.lr_device = borrowed.tensor.device.device_id
                common.double_lr = borrowed.tensor.dtype.bits == 64
        else:
            common.plan.lr = _number("lr", self._lr)
        common.plan.weight_decay = _number("weight_decay", group["weight_decay"])
        common.plan.grad_scale = -self.unscale if group["maximize"] else self.unscale
        common.capturable = group["capturable"]
        return 0

    cdef Record _next(self, param):
        """The state of a param, if it is the next one in the optimizer's; else None.

        States are made in the order of the params, so that walking along finds them. A look-up
        takes 80 ns, as the hash of a tensor is computed in Python.
        """
        cdef Py_ssize_t position = self._position
        cdef PyObject *key
        cdef PyObject *value
        if (
            isinstance(self._state, dict)
            and PyDict_Next(self._state, &position, &key, &value)
            and key == <PyObject *>param
        ):
            self._position = position
            return _usable(<object>value, param)
        return None

    cdef Record _find(self, param, group):
        """The state of a param: what the optimizer has, adopted if need be, or a new one."""
        cdef Record record
        if id(param) in self._new:
            return self._new[id(param)][1]
        found = self._state.get(param)
        record = _usable(found, param)
        if record is not None:
            return record
        record = find(self._state, param, found, group, self._settings, self._adopted)
        if record.param is not param:
            self._shares_state = True
        if record is not found:
            self._new[id(param)] = param, record, found
        return record

    cdef bint _add(self, param, grad, Record record, Common *common) except -1:
        """Add the row of a param. False, and nothing is added, if no engine can take it."""
        cdef Rows rows = self.rows
        cdef Row *row = rows.begin()
        cdef Mirror mirror
        if not (
            self._borrow_param(row, param, grad)
            and (row.device != CPU or not common.capturable)
            and not (record.is_open and record.missing())
            and self._plan(row, param, record, common, &mirror)
            and self._borrow_average(row, param, record, common)
        ):
            rows.abandon()
            return False
        self.written.append(param)
        rows.kept.append(grad)
        self._stepped.append(record)
        record.is_in_step = True
        if record.is_open:
            self.written += self._scalars
            if row.step != NULL:
                rows.mirror(&mirror)
        rows.commit()
        return True

    cdef bint _borrow_param(self, Row *row, param, grad) except -1:
        """Put a param and its gradient into the row. False if no engine can take them."""
        if not self._borrow(PARAM, param, param) or not (
                self._borrow(GRAD, grad, param) or self._borrow_copy(grad, param)):
            return False
        if row.device != CPU and row.device != self.rows.device:
            self.rows.note_stream(stream_of(param, row.device))  # of all of torch's work there
        return True

    cdef bint _borrow_average(self, Row *row, param, Record record, Common *common) except -1:
        """Put the average into the row, a new one where it begins. False if no engine can."""
        found = record.average()
        ax = found
        if ax is None and (
                common.capturable or not record.is_lazy or self._may_average(row, record)):
            # The step copies the param into it, or has to find there what it was before.
            ax = new_average(record, copies=row.step == NULL or row.step.mu != 1)
        if ax is not None and (row.step == NULL or row.step.mu != 0):
            if not self._borrow(AX, ax, param, not record.is_shown):
                ax = average_as_param(ax, param)
                if ax is None or not self._borrow(AX, ax, param):
                    return False
            if record.is_shown and found is not None:  # else no graph of autograd has it
                self.written.append(found)
            self.rows.kept.append(ax)
        if ax is not found:
            self._averages.append((record, ax))
        return True

    cdef bint _borrow(self, int role, tensor, param, bint is_own=False) except -1:
        """Put a tensor into the row; if it and the param are DTensors, its part on this rank.

        False if they are not alike in that, or no engine can take it.
        """
        cdef bint is_placed = not is_ordinary(param)
        if is_placed == is_ordinary(tensor):
            return False
        if is_placed:
            tensor = part_of(tensor, None if role == PARAM else param)
            if tensor is None:
                return False
            self.rows.kept.append(tensor)
        return self._put(role, tensor, is_own)

    cdef bint _put(self, int role, tensor, bint is_own) except -1:
        return (
            borrow_tensor(tensor, role != GRAD, &self.rows.arrays[role], is_own)
            and self.rows.put(role) is None
        )

    cdef bint _borrow_copy(self, grad, param) except -1:
        """Put a gradient of another dtype or layout into the row, converted to the param's."""
        part = grad
        if not is_ordinary(param):
            part, param = part_of(grad, param), part_of(param)
            if part is None:
                return False
        copy = grad_as_param(part, param)
        if copy is None or not self._put(GRAD, copy, True):
            return False
        self._converted.append(grad)
        self.rows.kept.append(copy)
        return True

    cdef bint _plan(
        self, Row *row, param, Record record, Common *common, Mirror *mirror,
    ) except -1:
        """Find the row's step, or the scalars from which a GPU will. False if no engine can."""
        if row.device != CPU and (self._scalars_on_device or common.capturable):
            return self._plan_on_device(row, param, record, common)
        return self._plan_on_host(row, record, common, mirror)

    cdef bint _plan_on_host(
        self, Row *row, Record record, Common *common, Mirror *mirror,
    ) except -1:
        cdef Plan plan
        cdef Step *step
        if record.device_scalars is not None:
            to_host(record)
        if record.is_open and not self._read(record, mirror):
            return False
        if (record.is_double and record.now.mu != 1 and row.kind == FLOAT32
                and self.rows.arrays[PARAM].tensor.ndim == 0):
            return False  # torch promotes it to the dtype of mu, which has no dimension either
        if isnan(common.plan.lr):
            common.plan.lr = number("lr", self._lr)
        plan = common.plan
        if not isnan(record.t0):
            plan.t0 = record.t0
        plan.float_step = not record.is_double
        plan.float_next = self._round_scalars or not record.is_double
        step = self.rows.step_for(&record.now, &plan)
        if plan.lr < 0 and not isfinite(step.next.eta) and _is_plain(self._lr):
            raise ValueError(
                f"Invalid learning rate: {self._lr} (1 + lambd * lr * step must stay above 0)")
        if common.in_types and not plan.current and step != common.computed:
            self._compute_in_types(step, &plan, record)
            common.computed = step
        row.step = step
        row.scalars = &record.now
        return True

    cdef bint _read(self, Record record, Mirror *mirror) except -1:
        """Read the scalars of an open record, or what somebody has put in their place."""
        scalars = record.scalars()
        if record.read(scalars, mirror):
            self._scalars = scalars
            return True
        scalars = tuple(on_host(record))
        if not record.read(scalars, mirror):
            return False
        self._scalars = ()  # nobody else has these
        self._replaced.append((record, scalars))
        return True

    cdef int _compute_in_types(self, Step *step, const Plan *plan, Record record) except -1:
        """Compute the scalars of a step as torch does of other types than float."""
        decay, eta, mu = scalars_in_types(self._group, step.eta, step.next.step)
        step.decay = number("decay", decay)
        step.next.eta = self._stored(eta, record)
        if (plan.average_every == 1 and plan.ema_decay == 1 and plan.power == 0
                and isnan(record.t0)):
            step.next.mu = self._stored(mu, record)
        return 0

    cdef double _stored(self, value, Record record) except? NAN:
        """A scalar in the precision in which torch stores it.

        That is the one of the state; a float becomes a tensor of torch's default dtype first.
        """
        cdef double stored = number("eta, mu", value)
        if not record.is_double or self._round_scalars and _is_plain(value):
            stored = rounded(stored)
        return stored

    cdef bint _plan_on_device(self, Row *row, param, Record record, Common *common) except -1:
        cdef DeviceScalars scalars
        cdef Plan plan = common.plan
        if common.lr_on_device != NULL and common.lr_device != row.device:
            return False
        scalars = record.scalars_on(row.device)
        if scalars is None:
            scalars = to_device(record, param.device)
        if record.is_open:
            self._scalars = record.scalars()
        if isnan(plan.lr) and common.lr_on_device == NULL:
            plan.lr = number("lr", self._lr)
        if not isnan(record.t0):
            plan.t0 = record.t0
        if self.rows.device_rows is None:
            self.rows.device_rows = DeviceRows()
        row.step = NULL
        row.device_row = scalars.fill(
            self.rows.device_rows, &plan, common.lr_on_device, common.double_lr)
        return True

    cdef bint _may_average(self, const Row *row, Record record) except -1:
        """Whether the step makes an iterate of the average, as far as the host knows."""
        cdef const Plan *plan
        cdef double steps
        if row.step != NULL:
            return averages(row.step)
        plan = &(<DeviceRows>self.rows.device_rows).rows[row.device_row - 1].plan
        steps = record.device_scalars.steps
        return mu_of(steps, plan) != 1 or mu_of(steps + 1, plan) != 1

    cdef int _check_memory(self, groups) except -1:
        """Leave everything to torch where memory is shared: its order of operations shows then."""
        if not self._shares_state and self.rows.is_disjoint():
            if not self._converted and not self.remaining:
                return 0
            outside = list(self._converted)
            for _, param, grad, record in self.remaining:
                outside += [param, grad, record.ax]
            if not self.rows.touches(list(map(extent, outside))):
                return 0
        self.end()
        self.rows.clear()
        self.written.clear()
        self._stepped.clear()
        self._averages.clear()
        self.remaining = []
        for group in groups:
            for param in group["params"]:
                if param.grad is not None:
                    grad = self._redistributed.get(id(param), param.grad)
                    self.remaining.append((group, param, grad, self._find(param, group)))
        return 0


def gather(state, groups, settings, double unscale=1.0):
    """Find out what a step has to do; nothing is changed but where scalars are.

    The gradients are multiplied by `unscale` first.

    Raises
    ------
    TypeError, ValueError
        A group was changed to what `check_group` refuses, or its lr to something so negative that
        eta has no value.
    RuntimeError
        Scalars would have to be made or moved while a CUDA graph is being captured.
    """
    cdef Work work = Work(state, settings, unscale)
    cdef bint by_torch = is_watched()
    for group in groups:
        if type(group) is not dict or not _needs_no_check(group):
            check_group(group)
    try:
        for group in groups:
            work._add_group(group, by_torch)
        work._check_memory(groups)
    except BaseException:
        work.end()
        raise
    return work


cdef bint _needs_no_check(dict group) except -1:
    """Whether a group has plain numbers in their ranges, and torch's hyperparameters alone.

    `check_group` says what is wrong with others. It takes 2 us, a fourth of a step of one tensor.
    """
    for name in _OWN:
        if name in group:
            return False
    return (
        _is_from(group["lambd"], 0) and _is_from(group["alpha"], 0)
        and _is_from(group["t0"], -INFINITY)
    )


cdef bint _is_from(value, double low) except -1:
    """Whether a hyperparameter is a finite plain number, not below the lowest that it may be."""
    cdef double plain
    if not _is_plain(value):
        return False
    try:
        plain = value
    except OverflowError:
        return False
    return low <= plain and isfinite(plain)


cdef double _number(str name, value) except? NAN:
    """A hyperparameter as `number` returns it, which takes 100 to 400 ns."""
    if _is_plain(value):
        try:
            return value
        except OverflowError:
            pass
    return number(name, value)


cdef inline bint _is_plain(value) noexcept:
    """Whether a hyperparameter is a number of Python's own, whose arithmetic is that of doubles."""
    return type(value) is float or type(value) is int


cdef inline Record _usable(found, param):
    """What was found in the place of a param's state, if a step can use it as it is; else None."""
    cdef Record record
    if type(found) is not ParamState:
        return None
    record = found
    return record if record.param is param and not record.is_empty() else None


cdef inline object _grad_of(param):
    if is_ordinary(param):
        return _get_grad(_grad, param, type(param))
    return param.grad
