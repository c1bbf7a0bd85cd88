"""step, eta and mu of a param in the memory of a GPU, which advances them there.

A captured graph has their addresses, and a GradScaler's steps are skipped where no host sees it, so
they cannot be the host's then. This module knows tensors by their addresses; it does not know how
kernels read them, nor which params have their scalars here.
"""

from libc.stdint cimport uintptr_t
from libc.stdlib cimport free

from asgd_fast._rows.rows cimport with_room
from asgd_fast._schedule cimport Plan


cdef class DeviceRows:
    """The rows of one step whose scalars are on their GPUs.

    Attributes
    ----------
    loss_scale, found_inf : dict of int to Tensor, or None
        One float32 in the memory of each GPU, by its number: what gradients are divided by, and
        whether the step is to be skipped.
    """

    def __cinit__(self):
        self.scalars = []

    def __dealloc__(self):
        free(self.rows)

    cdef int add(self, const DeviceRow *row, scalars) except -1:
        """Add a row that has some scalars; returns its place, from 1."""
        self.rows = <DeviceRow *>with_room(self.rows, self.n_rows, sizeof(DeviceRow))
        self.scalars.append(scalars)
        self.rows[self.n_rows] = row[0]
        self.n_rows += 1
        return self.n_rows

    def count(self):
        """Count the step, which is made now."""
        cdef DeviceScalars scalars
        for scalars in self.scalars:
            scalars.steps += 1

    def scale(self, devices, found_inf, loss_scale):
        """Set what a GradScaler found out.

        Parameters
        ----------
        devices : iterable of int
        found_inf : Tensor
        loss_scale : Tensor, float or None
        """
        self.found_inf = _on_each(devices, found_inf)
        self.loss_scale = None if loss_scale is None else _on_each(devices, loss_scale)


cdef class DeviceScalars:
    """The scalars of one param.

    Parameters
    ----------
    numbers : sequence of float
        step, eta and mu.
    device : torch.device
    dtype : torch.dtype
        float32 or float64.

    Attributes
    ----------
    device : int
    is_double : bool
    steps : float
        How many the param has made at most: the GPU skips those of infinite gradients.

    Raises
    ------
    RuntimeError
        The stream is being captured into a graph, of which making them cannot be a part.
    """

    def __init__(self, numbers, device, dtype):
        import torch

        with torch.inference_mode(False):
            # The blocks of a launch count themselves behind the scalars.
            self._block = torch.tensor([numbers, (0.0, 0.0, 0.0)], dtype=dtype, device=device)
        self._address = <void *><uintptr_t>self._block.data_ptr()
        self.device = self._block.device.index
        self.is_double = dtype == torch.float64
        self.steps = numbers[0]

    def views(self):
        """step, eta and mu as tensors of no dimension, which are the scalars themselves."""
        return self._block[0].unbind()

    def has(self, tensors):
        """Whether some tensors are these scalars."""
        cdef uintptr_t address = <uintptr_t>self._address
        cdef int size = 8 if self.is_double else 4
        return all([
            getattr(tensor, "is_cuda", False) and tensor.data_ptr() == address + i * size
            for i, tensor in enumerate(tensors)])

    cdef int fill(
        self, DeviceRows rows, const Plan *plan, const void *lr, bint double_lr,
    ) except -1:
        """Add a row that has these scalars; returns its place, from 1."""
        cdef DeviceRow row
        row.scalars = self._address
        row.double_scalars = self.is_double
        row.ticket = <char *>self._address + 3 * (8 if self.is_double else 4)
        row.plan = plan[0]
        row.lr = lr
        row.double_lr = double_lr
        return rows.add(&row, self)


def _on_each(devices, scalar):
    """A number as a float32 tensor in the memory of each of some GPUs, by their numbers."""
    import torch

    places = {number: torch.device("cuda", number) for number in devices}
    if not isinstance(scalar, torch.Tensor):
        return {
            number: torch.full((), scalar, dtype=torch.float32, device=place)
            for number, place in places.items()}
    scalar = scalar.detach().float()
    return {number: scalar.to(place, non_blocking=True) for number, place in places.items()}
