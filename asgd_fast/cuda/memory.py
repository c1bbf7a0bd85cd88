"""Copies between the memory of a CUDA device and the host's, for checkpoints.

This module knows addresses, sizes and streams; it does not know what is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asgd_fast.cuda.device import checked, device_of, driver

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["from_host", "to_host"]


def to_host(array: npt.NDArray[Any], address: int, device: int, stream: int) -> None:
    """Fill an array of the host with what a device has, and wait until it is there.

    Parameters
    ----------
    array : numpy.ndarray
        Whose elements fill a block of memory.
    address : int
        Of as many bytes.
    device : int
    stream : int
        After whose work it is to be.

    Raises
    ------
    RuntimeError
        The driver refuses.
    """
    call = driver()
    with device_of(device).current():
        checked(call.cuMemcpyDtoHAsync(_address(array), address, array.nbytes, stream))
        checked(call.cuStreamSynchronize(stream))


def from_host(array: npt.NDArray[Any], address: int, device: int, stream: int) -> None:
    """Copy an array of the host to a device, and wait until it is there.

    Parameters
    ----------
    array, address, device, stream
        As for `to_host`.

    Raises
    ------
    RuntimeError
        The driver refuses.
    """
    call = driver()
    with device_of(device).current():
        checked(call.cuMemcpyHtoDAsync(address, _address(array), array.nbytes, stream))
        checked(call.cuStreamSynchronize(stream))


def _address(array: npt.NDArray[np.generic]) -> int:
    return array.ctypes.data
