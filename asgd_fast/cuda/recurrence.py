"""step, eta and mu in the memory of a GPU: what a step makes of them, and how it advances them.

This is what `fill` of _schedule.pyx does on the host, in the GPU's double. This module knows the
words of one row and of its set (`at`); it does not know arrays, nor which thread calls.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from numba import types

from asgd_fast.cuda import launches as layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

__all__ = ["Recurrence", "make"]


class Recurrence(NamedTuple):
    """The functions of a target.

    Attributes
    ----------
    is_skipped : callable
        Of (words): whether a GradScaler has found gradients that are not finite.
    step_of : callable
        Of (words, row, at): eta, decay, weight_decay, grad_scale and mu of the step, in double.
    advance : callable
        Of (words, row, at): writes step, eta and mu for the next step.
    """

    is_skipped: Callable[..., Any]
    step_of: Callable[..., Any]
    advance: Callable[..., Any]


def make(ops: SimpleNamespace) -> Recurrence:
    """Return the functions of a target, made of its operations, as of `intrinsics.make`."""
    word, bits_of, add, sub, mul = ops.word, ops.real["float64"], ops.add, ops.sub, ops.mul
    read_float, read_double = ops.read_real["float32"], ops.read_real["float64"]
    write_float, write_double = ops.write_real["float32"], ops.write_real["float64"]

    @ops.function
    def number(words, i):
        return bits_of(word(words, i))

    @ops.function
    def has(words, at, flag):
        return (word(words, at + layout.FLAGS_AT) & flag) != 0

    @ops.function
    def rounded(x, is_double):
        return x if is_double else types.float64(types.float32(x))

    @ops.function
    def read(address, is_double):
        return read_double(address) if is_double else types.float64(read_float(address))

    @ops.function
    def write(address, x, is_double):
        if is_double:
            write_double(address, x)
        else:
            write_float(address, types.float32(x))

    @ops.function
    def lr_of(words, at):
        if has(words, at, layout.LR_IS_FLOAT | layout.LR_IS_DOUBLE):
            return read(word(words, at + layout.LR_AT), has(words, at, layout.LR_IS_DOUBLE))
        return number(words, at + layout.LR_AT)

    @ops.function
    def eta_of(words, at, step):
        lr, lambd = lr_of(words, at), number(words, at + layout.LAMBD_AT)
        if has(words, at, layout.IS_CURRENT):
            step -= number(words, at + layout.T0_AT)
            if step <= 0.0:
                return lr
        return lr / add(1.0, mul(mul(lambd, lr), step)) ** number(words, at + layout.ALPHA_AT)

    @ops.function
    def mu_of(words, at, step):
        every, decay = number(words, at + layout.EVERY_AT), number(words, at + layout.EMA_DECAY_AT)
        power = number(words, at + layout.POWER_AT)
        step -= number(words, at + layout.T0_AT)
        if every == 1.0 and decay == 1.0 and power == 0.0:
            return 1.0 / max(1.0, step)
        after_first = types.float64(math.floor(step - 1.0))
        if after_first <= 0.0:
            return 1.0
        n = types.float64(math.floor(after_first / every))
        if n * every != after_first:
            return 0.0
        if decay != 1.0:
            return sub(1.0, decay) / -math.expm1(mul(n + 1.0, math.log(decay)))
        return (1.0 + power) / (n + 1.0 + power)

    @ops.function
    def is_skipped(words):
        found_inf = word(words, layout.FOUND_INF_AT)
        return found_inf != 0 and read_float(found_inf) != 0.0

    @ops.function
    def stored(words, row, at):
        is_double = has(words, at, layout.SCALARS_ARE_DOUBLE)
        address, size = word(words, row + layout.SCALARS_AT), 8 if is_double else 4
        return address, size, is_double

    @ops.function
    def step_of(words, row, at):
        address, size, is_double = stored(words, row, at)
        step, eta = read(address, is_double), read(address + size, is_double)
        is_current = has(words, at, layout.IS_CURRENT)
        if is_current:
            eta = eta_of(words, at, step)
        elif step == 0.0:
            # It may have changed since the state was made, if steps were skipped.
            eta = rounded(lr_of(words, at), is_double)
        decay = sub(1.0, mul(number(words, at + layout.LAMBD_AT), eta))
        if is_current and step <= number(words, at + layout.T0_AT):
            decay = 1.0
        weight_decay = number(words, at + layout.L2_AT)
        grad_scale = number(words, at + layout.SIGN_AT)
        loss_scale = word(words, layout.LOSS_SCALE_AT)
        if loss_scale != 0:
            grad_scale *= types.float64(types.float32(1.0 / read_float(loss_scale)))
        return eta, decay, weight_decay, grad_scale, read(address + 2 * size, is_double)

    @ops.function
    def advance(words, row, at):
        address, size, is_double = stored(words, row, at)
        step = rounded(read(address, is_double) + 1.0, is_double)
        write(address, step, is_double)
        write(address + size, eta_of(words, at, step), is_double)
        write(address + 2 * size, mu_of(words, at, step), is_double)

    return Recurrence(is_skipped, step_of, advance)
