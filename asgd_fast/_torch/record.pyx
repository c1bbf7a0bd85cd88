"""The state of one param, sealed until somebody looks at it.

A sealed record keeps step, eta and mu as numbers, which the engine may read and write without
asking, since nobody else knows them. An open one has them as tensors, which somebody may hold,
replace or move: they are asked for in each step. Where a record has what:

            step, eta, mu                        average, once `has_average`
    sealed  `now`, or a GPU (`device_scalars`)   `_ax`, nobody else's until a checkpoint `is_shown`
    open    the dict's tensors, maybe a GPU's    the dict's "ax"; if not there, somebody removed it

This module knows no groups and no steps.
"""

from cpython.dict cimport PyDict_Size
from libc.math cimport NAN, isnan

import torch

from asgd_fast._rows.describe cimport data_of, n_elements
from asgd_fast._rows.dlpack cimport Borrowed, give_back, kDLCPU, kDLFloat
from asgd_fast._rows.rows cimport Mirror
from asgd_fast._torch.conversions import clone_as
from asgd_fast._torch.internals import is_watched
from asgd_fast._torch.memory cimport borrow_tensor, is_ordinary, number_as_tensor
from asgd_fast.cuda.scalars cimport DeviceScalars

SCALARS = ("step", "eta", "mu")

cdef tuple _NAMES = SCALARS


def scalar_tensor(double value, dtype):
    """A number as a tensor of no dimension of the host, whatever modes and defaults torch is in."""
    # make_fx lets the value of a `tensor` be read; a `scalar_tensor` takes half the time.
    make = torch.tensor if is_watched() else torch.scalar_tensor
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # 2 us, as long as all the rest
            return make(value, dtype=dtype, device="cpu")
    return make(value, dtype=dtype, device="cpu")


# No comprehensions: in Cython 3.3 they release an item twice where a list finds no memory to grow.
cdef tuple _tensors(numbers, dtype):
    """step, eta and mu as tensors of torch's own, which may be resized."""
    step, eta, mu = numbers
    return scalar_tensor(step, dtype), scalar_tensor(eta, dtype), scalar_tensor(mu, dtype)


cdef tuple _quick_tensors(numbers, bint is_double):
    """step, eta and mu as tensors of no dimension of the host, each with memory of its own.

    A pickled view of a tensor has all the memory of that with it.
    """
    step, eta, mu = numbers
    if not is_watched() and not torch.is_inference_mode_enabled():
        one = number_as_tensor(step, is_double)
        two = number_as_tensor(eta, is_double)
        three = number_as_tensor(mu, is_double)
        if one is not None and two is not None and three is not None:
            return one, two, three
    return _tensors(numbers, torch.float64 if is_double else torch.float32)


cdef class Record(dict):
    """The state of one param.

    Made of a mapping it is an ordinary dict, open and of no param.

    Attributes
    ----------
    param : Tensor or None
    source : Tensor
        What an average equals that has not begun: the param, or where its memory was.
    average_dtype : torch.dtype
        Of its average.
    is_open : bool
        Whether somebody may have its tensors.
    is_lazy : bool
        Whether there is no average before it begins.
    has_average : bool
        Whether an average was made, which the record then must hold.
    """

    def __init__(self, *args, **kwargs):
        dict.__init__(self, *args, **kwargs)
        self.is_open = self.is_shown = True
        self.t0 = NAN

    def seal(self, scalars, *, bint is_double):
        """Keep the entries, of which nobody else has the tensors, outside of the dict.

        Parameters
        ----------
        scalars : sequence of float
            step, eta and mu.
        is_double : bool
            Whether they are float64 rather than float32.
        """
        self._ax = dict.get(self, "ax")
        t0 = dict.get(self, "t0")
        self.t0 = NAN if t0 is None else t0
        self.now.step, self.now.eta, self.now.mu = scalars
        self.is_double = is_double
        dict.clear(self)
        self.is_open = self.is_shown = False

    def bind(self, param, *, bint is_lazy, average_dtype):
        """Become the state of a param, as it stands."""
        self.param = self.source = param
        self.is_lazy = is_lazy
        self.average_dtype = average_dtype
        self.has_average = dict.__contains__(self, "ax")
        return self

    def open(self):
        """Put the tensors into the dict, for somebody to look at."""
        if self.is_open:
            return
        scalars = self.scalars()
        if self.device_scalars is None:
            scalars = _tensors(scalars, self.dtype)
        contents = self._with(scalars, None)
        self.is_open = self.is_shown = True
        dict.update(self, contents)
        self._ax = None
        self.is_behind = self.is_in_step and self.device_scalars is None

    cdef int leave_step(self) except -1:
        """Let tensors show a step that another thread has opened the record in."""
        self.is_in_step = False
        if self.is_behind:
            self.is_behind = False
            with torch.no_grad(), torch.inference_mode(False):
                for name, value in zip(
                        _NAMES, (self.now.step, self.now.eta, self.now.mu), strict=True):
                    dict.__getitem__(self, name).fill_(value)
        return 0

    def contents(self, ax=None):
        """The entries as a plain dict, of tensors of its own where the record is sealed.

        Parameters
        ----------
        ax : Tensor, optional
            What stands for an average that there is not.

        Returns
        -------
        dict
            In torch's order.
        """
        cdef dict contents
        if self.is_open:
            contents = {name: dict.__getitem__(self, name) for name in dict.__iter__(self)}
            if ax is None or "ax" in contents:
                return contents
            others = {name: contents.pop(name) for name in list(contents) if name not in _NAMES}
            return {**contents, "ax": ax, **others}
        if self.device_scalars is not None:
            return self._with(self.device_scalars.views(), ax)
        return self._with(_quick_tensors(self.scalars(), self.is_double), ax)

    cdef dict _with(self, scalars, ax):
        """The entries of a sealed record, with tensors for step, eta and mu."""
        cdef dict contents = {"step": scalars[0], "eta": scalars[1], "mu": scalars[2]}
        if self._ax is not None:
            contents["ax"] = self._ax
            self.is_shown = True
        elif ax is not None:
            contents["ax"] = ax
        if not isnan(self.t0):
            contents["t0"] = self.t0
        return contents

    def complete(self):
        """The entries as torch has them, an average among them, as a plain dict.

        To be called within `ordinary_tensors`.
        """
        if (
            self.param is None or self.has_average
            or self.is_open and (self.is_empty() or dict.__contains__(self, "ax"))
        ):
            return self.contents()
        return self.contents(clone_as(self.source, self.average_dtype))

    @property
    def has_numbers(self):
        """Whether step, eta and mu are numbers rather than tensors."""
        return not self.is_open and self.device_scalars is None

    @property
    def dtype(self):
        """The dtype of the scalars."""
        return torch.float64 if self.is_double else torch.float32

    def scalars(self):
        """step, eta and mu as they stand in the record: numbers, or tensors that have them."""
        if self.is_open:
            return (
                dict.__getitem__(self, "step"), dict.__getitem__(self, "eta"),
                dict.__getitem__(self, "mu"),
            )
        if self.device_scalars is not None:
            return tuple(self.device_scalars.views())
        return self.now.step, self.now.eta, self.now.mu

    @property
    def mu(self):
        """mu as it stands in the record: a number, or a tensor that has it."""
        return self.now.mu if self.has_numbers else self.scalars()[2]

    cdef bint is_empty(self) noexcept:
        """Whether there is nothing in it, so that the state is to be made anew."""
        return self.is_open and PyDict_Size(self) == 0

    def missing(self):
        """The names of the entries that a step needs and an open record does not have."""
        names = [*_NAMES, "ax"] if self.has_average else _NAMES
        return [name for name in names if not dict.__contains__(self, name)]

    cdef object average(self):
        """The average; None if there is none."""
        return dict.get(self, "ax") if self.is_open else self._ax

    @property
    def ax(self):
        """The average, or None: to set it says whether there is one."""
        return self.average()

    @ax.setter
    def ax(self, ax):
        self.has_average = ax is not None
        if not self.is_open:
            self._ax = ax
        elif ax is not None:
            dict.__setitem__(self, "ax", ax)
        elif dict.__contains__(self, "ax"):
            dict.__delitem__(self, "ax")

    @property
    def own_t0(self):
        """The t0 of this param alone; None where that of the group holds."""
        if self.is_open:
            return dict.get(self, "t0")
        return None if isnan(self.t0) else self.t0

    @own_t0.setter
    def own_t0(self, t0):
        self.t0 = NAN if t0 is None else t0
        if self.is_open:
            if t0 is not None:
                dict.__setitem__(self, "t0", t0)
            elif dict.__contains__(self, "t0"):
                dict.__delitem__(self, "t0")

    def begin_anew(self, double step):
        """Set mu to 1 after so many steps, so that the next step's iterate is copied."""
        if self.has_numbers:
            self.now.mu = 1
            return
        if self.device_scalars is not None:
            self.device_scalars.steps = step
        mu = self.mu
        if not isinstance(mu, torch.Tensor):
            dict.__setitem__(self, "mu", 1.0)
            return
        with torch.no_grad(), torch.inference_mode(False):
            mu.fill_(1)

    cdef int read(self, tuple scalars, Mirror *mirror) except -1:
        """Read the scalars of an open record, and note where they are to be written.

        False if they are not three tensors of one float on the host.
        """
        cdef Borrowed borrowed
        cdef double values[3]
        cdef bint is_fit
        cdef int i
        for i in range(3):
            tensor = scalars[i]
            if not is_ordinary(tensor) or not borrow_tensor(tensor, True, &borrowed):
                return False
            is_fit = (
                borrowed.tensor.device.device_type == kDLCPU
                and borrowed.tensor.dtype.code == kDLFloat
                and borrowed.tensor.dtype.bits >= 32
                and n_elements(&borrowed.tensor) == 1
            )
            give_back(&borrowed)  # the record keeps the tensor
            if not is_fit:
                return False
            if borrowed.tensor.data == NULL:
                raise RuntimeError("state: the memory of step, eta and mu was taken away")
            mirror.to[i] = data_of(&borrowed.tensor)
            mirror.is_double[i] = borrowed.tensor.dtype.bits == 64
            values[i] = (
                (<double *>mirror.to[i])[0] if mirror.is_double[i] else (<float *>mirror.to[i])[0])
        self.now.step, self.now.eta, self.now.mu = values[0], values[1], values[2]
        self.is_double = mirror.is_double[0] or mirror.is_double[1] or mirror.is_double[2]
        mirror.scalars = &self.now
        own = dict.get(self, "t0")
        self.t0 = NAN if own is None else own
        return True

    cdef DeviceScalars scalars_on(self, int device):
        """The scalars in the memory of a GPU; None if they are not there, or were replaced."""
        own = self.device_scalars
        if own is None or own.device != device:
            return None
        if self.is_open and not own.has(
                [dict.get(self, "step"), dict.get(self, "eta"), dict.get(self, "mu")]):
            return None
        if self.is_open:
            t0 = dict.get(self, "t0")
            self.t0 = NAN if t0 is None else t0
        return own

    def move(self, DeviceScalars device_scalars, numbers=None):
        """Let a GPU have the scalars from now on, or the host.

        Parameters
        ----------
        device_scalars : DeviceScalars or None
        numbers : tuple of float, optional
            What the host then has.
        """
        self.device_scalars = device_scalars
        if device_scalars is None:
            self.now.step, self.now.eta, self.now.mu = numbers
        if self.is_open:
            tensors = (
                device_scalars.views() if device_scalars is not None
                else _tensors(numbers, self.dtype))
            for name, tensor in zip(_NAMES, tensors, strict=True):
                dict.__setitem__(self, name, tensor)
