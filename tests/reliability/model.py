"""The step of docs/numerics.md on NumPy arrays, element by element, with the C library's fma.

Written independently of the library under test, and without torch.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math

import numpy as np

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_FMA = {}
for _name, _number, _dtype in (
    ("fmaf", ctypes.c_float, np.float32),
    ("fma", ctypes.c_double, np.float64),
):
    _function = getattr(_libm, _name)
    _function.argtypes, _function.restype = [_number] * 3, _number
    _FMA[np.dtype(_dtype)] = np.frompyfunc(_function, 3, 1)


def fma(x, y, z):
    return _FMA[z.dtype](x, y, z).astype(z.dtype)


def reals(array):
    """The numbers of an array in C order, as pairs of reals if it is complex."""
    array = array.ravel()
    return array.view(array.real.dtype) if array.dtype.kind == "c" else array


def stepped(
    p, g, ax, *, eta, mu, lambd=0.0, decay=None, weight_decay=0.0, maximize=False, grad_scale=None
):
    """Return the new p and ax of arrays of reals; ax may be None.

    `decay` stands for 1 - lambd * eta where another is wanted.
    """
    compute = np.dtype(np.float32 if p.dtype.itemsize == 2 else p.dtype)
    scalar = compute.type
    with np.errstate(all="ignore"):
        stored, p, g = p.dtype, p.astype(compute), g.astype(compute)
        if grad_scale is not None:
            g = g * scalar(grad_scale)
        if maximize:
            g = -g
        if weight_decay != 0:
            g = fma(scalar(weight_decay), p, g)
        p = fma(-scalar(eta), g, p * scalar(1 - lambd * eta if decay is None else decay))
        if ax is not None:
            # Half types see the p before it is rounded, wider averages the p that is stored.
            new = p if ax.dtype == stored else p.astype(stored).astype(ax.dtype)
            if mu != 1:
                old = ax.astype(new.dtype)
                new = old + (new - old) * new.dtype.type(mu)
            ax = new.astype(ax.dtype)
        return p.astype(stored), ax


def eta_after(k, group, t0):
    """The step size of the step that follows k steps."""
    if group["lr_schedule"] == "current":
        k -= t0
        if k <= 0:
            return group["lr"]
    return group["lr"] / math.pow(1 + group["lambd"] * group["lr"] * k, group["alpha"])


def mu_after(k, group, t0):
    """The weight of iterate k + 1, of which t0 + 2 is the first one in the average."""
    later = k + 1 - (t0 + 2)
    if later <= 0:
        return 1.0
    every, averaging = group["average_every"], group["averaging"]
    if every == 1 and averaging == "mean":
        return 1 / (later + 1)
    place, beside = divmod(math.floor(later), every)
    if beside:
        return 0.0
    kind, number = ("polynomial", 0) if averaging == "mean" else averaging
    if kind == "ema":
        return (1 - number) / -math.expm1((place + 1) * math.log(number))
    return (1 + number) / (place + 1 + number)


def same(ours, theirs):
    """Whether two arrays of reals have the same bits; NaN payloads may differ."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    nan = np.isnan(ours)
    if not np.array_equal(nan, np.isnan(theirs)):
        return False
    return np.where(nan, 0, ours).tobytes() == np.where(nan, 0, theirs).tobytes()
