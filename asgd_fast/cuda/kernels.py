"""The GPU's kernels: what each thread of each block does with the rows of a launch.

This module knows words, addresses and numbers; it does not know how a kernel is compiled or
launched, nor where the words come from: `launches` lays them out.

The update is the one of _cpu/loops.pxi, with its bits. The functions that make it are compiled for
the GPU, for the CPU (`twin`), and run as they are in Numba's simulator: so they are checked without
a GPU.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from numba import cuda, types

from asgd_fast.cuda.intrinsics import ACCESS, SIZES
from asgd_fast.cuda.launches import (
    ALPHA_AT,
    AVERAGE,
    CHUNK_AT,
    COPY,
    DECAY_AT,
    EMA_DECAY_AT,
    EVERY_AT,
    FACTOR_AT,
    FIRST_BITS,
    FLAGS_AT,
    FOUND_INF_AT,
    HAS_WEIGHT_DECAY,
    HEADER,
    HOW_AT,
    IS_CURRENT,
    JOB_AT,
    L2_AT,
    LAMBD_AT,
    LOSS_SCALE_AT,
    LR_AT,
    LR_IS_DOUBLE,
    LR_IS_FLOAT,
    MU_AT,
    N_CHUNKS_AT,
    N_ROWS_AT,
    NEG_ETA_AT,
    NO_AVERAGE,
    PHASES,
    PLACE_AT,
    POWER_AT,
    SCALARS_ARE_DOUBLE,
    SCALARS_AT,
    SETS_AT,
    SIGN_AT,
    SKIP,
    SWAP,
    T0_AT,
    TAIL_BITS,
    THREADS,
    TICKET_AT,
    WEIGHT_DECAY_AT,
    row_words,
    set_words,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    from asgd_fast.cuda.build import Kind

__all__ = ["jobs_of", "kernel", "twin"]


class Jobs(NamedTuple):
    """What there is to do in a launch.

    Attributes
    ----------
    do_chunk : callable
        Of (words, block, thread): what this thread of this block has to do.
    finish : callable or None
        Of (words, thread), after all chunks are done, once: what this thread then has to do.
    """

    do_chunk: Callable[..., None]
    finish: Callable[..., None] | None


def jobs_of(kind: Kind, ops: SimpleNamespace) -> Jobs:
    """Return what a kernel does, made of the operations of a target, as of `intrinsics.make`."""
    if kind.job == "exchange":
        return Jobs(_exchange(kind, ops), None)
    if kind.job == "assign":
        return Jobs(_assign(kind, ops), None)
    if kind.device_scalars:
        return Jobs(_update(kind, ops, _scalars_in_memory(kind, ops)), _advance(kind, ops))
    return Jobs(_update(kind, ops, _scalars_of_set(kind, ops)), None)


def kernel(kind: Kind, ops: SimpleNamespace) -> Callable[[Any], None]:
    """Return a kernel, a function of its words, for Numba to compile."""
    do_chunk, finish = jobs_of(kind, ops)

    if finish is None:

        def run(words):
            do_chunk(words, types.int64(cuda.blockIdx.x), types.int64(cuda.threadIdx.x))

        return run

    word, ticket = ops.word, ops.ticket

    def run_and_finish(words):
        thread = types.int64(cuda.threadIdx.x)
        do_chunk(words, types.int64(cuda.blockIdx.x), thread)
        # The block that is last to get here finishes: all others have read what it changes.
        cuda.syncthreads()
        others = cuda.gridDim.x - 1
        is_last = False
        if thread == 0:
            is_last = ticket(word(words, TICKET_AT), types.int64(others)) == others
        if cuda.syncthreads_or(types.int32(is_last)):
            finish(words, thread)

    return run_and_finish


def twin(kind: Kind, ops: SimpleNamespace) -> Callable[[int, int], None]:
    """Return what a launch does, for the CPU: a function of an address of words and n_blocks."""
    do_chunk, finish = jobs_of(kind, ops)

    @ops.function
    def run(words, n_blocks):
        for block in range(n_blocks):
            for thread in range(THREADS):
                do_chunk(words, block, thread)
        if finish is not None:
            for thread in range(THREADS):
                finish(words, thread)

    return run


def _update(kind: Kind, ops: SimpleNamespace, scalars_of: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that updates a chunk, with the scalars of its row."""
    find, walk = _find(kind, ops), _walk(ops, kind, _update_unit(kind, ops), has_phases=True)

    @ops.function
    def do_chunk(words, block, thread):
        row, param, grad, ax, n, at = find(words, block)
        phase, scalars = scalars_of(words, row, at, ax)
        if phase != SKIP:
            walk(param, grad, ax, n, thread, phase, scalars)

    return do_chunk


def _update_unit(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that updates a vector: the formula, each line rounded once."""
    computed = "float64" if kind.param == "float64" else "float32"
    mean = "float64" if kind.average == "float64" else "float32"
    is_wide = SIZES[kind.average] > SIZES[kind.param]
    size, ax_size = SIZES[kind.param], SIZES[kind.average]
    add, sub, mul, fma, select = ops.add, ops.sub, ops.mul, ops.fma, ops.select
    widen, rounded = ops.convert(mean), ops.rounded(kind.param)

    def unit(lanes: int, parts: int) -> Callable[..., Any]:
        load = ops.load(kind.param, computed, lanes, parts)
        store = ops.store(kind.param, computed, lanes, parts)
        load_ax = ops.load(kind.average, mean, lanes, parts)
        store_ax = ops.store(kind.average, mean, lanes, parts)
        stride, ax_stride = THREADS * lanes * size, THREADS * lanes * ax_size

        @ops.function
        def update(param, grad, ax, i, phase, scalars):
            neg_eta, decay, has_weight_decay, weight_decay, grad_scale, mu = scalars
            p = load(param + i * size, stride)
            g = load(grad + i * size, stride)
            a = widen(p)
            if phase == AVERAGE:
                a = load_ax(ax + i * ax_size, ax_stride)
            g = mul(g, grad_scale)
            g = select(has_weight_decay, fma(weight_decay, p, g), g)
            p = fma(neg_eta, g, mul(p, decay))
            store(param + i * size, stride, p)
            if is_wide:  # than the param, of what that has become
                p = rounded(p)
            if phase == AVERAGE:
                store_ax(ax + i * ax_size, ax_stride, add(a, mul(sub(widen(p), a), mu)))
            elif phase == COPY:
                store_ax(ax + i * ax_size, ax_stride, widen(p))

        return update

    return unit


def _exchange(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that swaps params and averages, or copies grads over params, in bits."""
    size = SIZES[kind.param]
    word, find = ops.word, _find(kind, ops)

    def swap_unit(lanes: int, parts: int) -> Callable[..., Any]:
        load, store, stride = _mover(ops, kind.param, lanes, parts)

        @ops.function
        def swap(param, grad, ax, i, phase, scalars):
            p, a = load(param + i * size, stride), load(ax + i * size, stride)
            store(param + i * size, stride, a)
            store(ax + i * size, stride, p)

        return swap

    def copy_unit(lanes: int, parts: int) -> Callable[..., Any]:
        load, store, stride = _mover(ops, kind.param, lanes, parts)

        @ops.function
        def copy(param, grad, ax, i, phase, scalars):
            store(param + i * size, stride, load(grad + i * size, stride))

        return copy

    swapping = _walk(ops, kind, swap_unit)
    copying = _walk(ops, kind, copy_unit)

    @ops.function
    def do_chunk(words, block, thread):
        _, param, grad, ax, n, _ = find(words, block)
        if word(words, JOB_AT) == SWAP:
            swapping(param, param, ax, n, thread, 0, 0)
        else:
            copying(param, grad, 0, n, thread, 0, 0)

    return do_chunk


def _mover(ops: SimpleNamespace, bits: str, lanes: int, parts: int) -> tuple[Any, Any, int]:
    form = (bits, bits, lanes, parts)
    return ops.load(*form), ops.store(*form), THREADS * lanes * SIZES[bits]


def _assign(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that assigns averages to params that are narrower."""
    computed = "float64" if kind.average == "float64" else "float32"
    size, ax_size = SIZES[kind.param], SIZES[kind.average]
    find = _find(kind, ops)
    narrow = ops.convert("float32")

    def unit(lanes: int, parts: int) -> Callable[..., Any]:
        load = ops.load(kind.average, computed, lanes, parts)
        store = ops.store(kind.param, "float32", lanes, parts)
        stride, ax_stride = THREADS * lanes * size, THREADS * lanes * ax_size

        @ops.function
        def assign(param, grad, ax, i, phase, scalars):
            store(param + i * size, stride, narrow(load(ax + i * ax_size, ax_stride)))

        return assign

    assigning = _walk(ops, kind, unit)

    @ops.function
    def do_chunk(words, block, thread):
        _, param, _, ax, n, _ = find(words, block)
        assigning(param, param, ax, n, thread, 0, 0)

    return do_chunk


def _find(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that finds the chunk of a block: its row, addresses, length, set."""
    word = ops.word
    size, ax_size = SIZES[kind.param], SIZES[kind.average]
    row_size, set_at = row_words(kind.device_scalars), _set_at(kind, ops)
    first_mask, tail_mask = (1 << FIRST_BITS) - 1, (1 << TAIL_BITS) - 1

    @ops.function
    def first_of(words, i):
        return word(words, HEADER + i * row_size + PLACE_AT) & first_mask

    @ops.function
    def find(words, block):
        n_rows = word(words, N_ROWS_AT)
        low, high = 0, n_rows
        while high - low > 1:
            middle = (low + high) >> 1
            if first_of(words, middle) <= block:
                low = middle
            else:
                high = middle
        row = HEADER + low * row_size
        place = word(words, row + PLACE_AT)
        n = word(words, CHUNK_AT)
        start = (block - (place & first_mask)) * n
        stop = first_of(words, high) if high < n_rows else word(words, N_CHUNKS_AT)
        if block + 1 >= stop:
            n = (place >> FIRST_BITS) & tail_mask
        param = word(words, row) + start * size
        grad = word(words, row + 1) + start * size
        ax = word(words, row + 2)
        if ax != 0:
            ax += start * ax_size
        return row, param, grad, ax, n, set_at(words, row)

    return find


def _set_at(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that finds the set of scalars of a row."""
    word, set_size = ops.word, set_words(kind.device_scalars)

    @ops.function
    def set_at(words, row):
        number = word(words, row + PLACE_AT) >> (FIRST_BITS + TAIL_BITS)
        return word(words, SETS_AT) - number * set_size

    return set_at


def _walk(
    ops: SimpleNamespace,
    kind: Kind,
    unit: Callable[[int, int], Any],
    *,
    has_phases: bool = False,
) -> Callable[..., Any]:
    """Return the function that does a unit of work to all of a chunk, mostly 16 bytes at a time.

    That takes memory which is aligned once some numbers are done singly; else all are.
    """
    size, ax_size = SIZES[kind.param], SIZES[kind.average]
    lanes = ACCESS // size
    stride = THREADS * lanes
    # Two accesses at once keep more of the memory busy, where the registers have room: eight
    # doubles fill them alone, and scalars on the device take some.
    room = ACCESS if kind.device_scalars else 2 * ACCESS
    parts = 2 if lanes * ax_size <= room else 1
    many, once, singly = unit(lanes, parts), unit(lanes, 1), unit(1, 1)
    ahead = (parts - 1) * stride

    @ops.function
    def walk(param, grad, ax, n, thread, phase, scalars):
        head = min((-param & (ACCESS - 1)) // size, n)
        ends = (param + head * size) | (grad + head * size)
        if ax != 0:
            ends |= ax + head * ax_size
        if ends & (ACCESS - 1):
            head = n
        tail = (n - head) & (lanes - 1)
        stop = n - tail
        i = head + thread * lanes
        # A loop for each phase: in one with branches the average is loaded when the rest has come.
        if has_phases and phase == AVERAGE:
            while i + ahead < stop:
                many(param, grad, ax, i, AVERAGE, scalars)
                i += parts * stride
        elif has_phases and phase == COPY:
            while i + ahead < stop:
                many(param, grad, ax, i, COPY, scalars)
                i += parts * stride
        else:
            while i + ahead < stop:
                many(param, grad, ax, i, NO_AVERAGE, scalars)
                i += parts * stride
        if i < stop:
            once(param, grad, ax, i, phase, scalars)
        i = thread
        while i < head + tail:
            singly(param, grad, ax, i if i < head else i - head + stop, phase, scalars)
            i += THREADS

    return walk


def _scalars_of_set(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that reads scalars that came with the launch, rounded already."""
    word = ops.word
    real = ops.real["float64" if kind.param == "float64" else "float32"]
    mean = ops.real["float64" if kind.average == "float64" else "float32"]

    @ops.function
    def scalars_of(words, row, at, ax):
        how = word(words, at + HOW_AT)
        return how & PHASES, (
            real(word(words, at + NEG_ETA_AT)),
            real(word(words, at + DECAY_AT)),
            (how & HAS_WEIGHT_DECAY) != 0,
            real(word(words, at + WEIGHT_DECAY_AT)),
            real(word(words, at + FACTOR_AT)),
            mean(word(words, at + MU_AT)),
        )

    return scalars_of


def _scalars_in_memory(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that computes scalars from those in the GPU's memory, as `fill` does."""
    word, double, read_float = ops.word, ops.real["float64"], ops.read_real["float32"]
    sub, mul = ops.sub, ops.mul
    real = types.float64 if kind.param == "float64" else types.float32
    mean = types.float64 if kind.average == "float64" else types.float32
    stored, plan_of, is_skipped, eta_after = _stored(ops), _plan(ops), _is_skipped(ops), _eta(ops)

    @ops.function
    def scalars_of(words, row, at, ax):
        step, eta, mu = stored(words, row, at)
        lr, lambd, alpha, t0, is_current = plan_of(words, at)
        if is_current:
            eta = eta_after(step - t0, lr, lambd, alpha, is_current)
        elif step == 0.0:
            # It may have changed since the state was made, if steps were skipped.
            eta = lr
            if word(words, at + FLAGS_AT) & SCALARS_ARE_DOUBLE == 0:
                eta = types.float64(types.float32(lr))
        decay = sub(1.0, mul(lambd, eta))
        if is_current and step <= t0:
            decay = 1.0
        factor = double(word(words, at + SIGN_AT))
        if word(words, LOSS_SCALE_AT) != 0:
            factor *= types.float64(types.float32(1.0 / read_float(word(words, LOSS_SCALE_AT))))
        weight_decay = double(word(words, at + L2_AT))
        if is_skipped(words):
            phase = SKIP
        elif ax == 0 or mu == 0.0:
            phase = NO_AVERAGE
        else:
            phase = COPY if mu == 1.0 else AVERAGE
        return phase, (
            real(-eta),
            real(decay),
            weight_decay != 0.0,
            real(weight_decay),
            real(factor),
            mean(mu),
        )

    return scalars_of


def _advance(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that advances the scalars of all rows, as `fill` does on the host."""
    word, double, sub, mul = ops.word, ops.real["float64"], ops.sub, ops.mul
    row_size, set_at = row_words(True), _set_at(kind, ops)
    write_float, write_double = ops.write_real["float32"], ops.write_real["float64"]
    stored, plan_of, is_skipped, eta_after = _stored(ops), _plan(ops), _is_skipped(ops), _eta(ops)

    @ops.function
    def mu_after(words, at, step):
        every, decay = double(word(words, at + EVERY_AT)), double(word(words, at + EMA_DECAY_AT))
        power = double(word(words, at + POWER_AT))
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
    def finish(words, thread):
        i = thread
        n_rows = word(words, N_ROWS_AT)
        if is_skipped(words):
            i = n_rows
        while i < n_rows:
            row = HEADER + i * row_size
            at = set_at(words, row)
            step, _, _ = stored(words, row, at)
            lr, lambd, alpha, t0, is_current = plan_of(words, at)
            address = word(words, row + SCALARS_AT)
            if word(words, at + FLAGS_AT) & SCALARS_ARE_DOUBLE:
                step += 1.0
                since = step - t0 if is_current else step
                write_double(address, step)
                write_double(address + 8, eta_after(since, lr, lambd, alpha, is_current))
                write_double(address + 16, mu_after(words, at, step - t0))
            else:
                step = types.float64(types.float32(step + 1.0))
                since = step - t0 if is_current else step
                eta = eta_after(since, lr, lambd, alpha, is_current)
                write_float(address, types.float32(step))
                write_float(address + 4, types.float32(eta))
                write_float(address + 8, types.float32(mu_after(words, at, step - t0)))
            i += THREADS

    return finish


def _stored(ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that reads step, eta and mu of a row."""
    word, read_float, read_double = ops.word, ops.read_real["float32"], ops.read_real["float64"]

    @ops.function
    def stored(words, row, at):
        address = word(words, row + SCALARS_AT)
        if word(words, at + FLAGS_AT) & SCALARS_ARE_DOUBLE:
            return read_double(address), read_double(address + 8), read_double(address + 16)
        return (
            types.float64(read_float(address)),
            types.float64(read_float(address + 4)),
            types.float64(read_float(address + 8)),
        )

    return stored


def _plan(ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that reads the hyperparameters of a set from which eta follows."""
    word, double = ops.word, ops.real["float64"]
    read_float, read_double = ops.read_real["float32"], ops.read_real["float64"]

    @ops.function
    def plan_of(words, at):
        flags = word(words, at + FLAGS_AT)
        lr = double(word(words, at + LR_AT))
        if flags & LR_IS_FLOAT:
            lr = types.float64(read_float(word(words, at + LR_AT)))
        elif flags & LR_IS_DOUBLE:
            lr = read_double(word(words, at + LR_AT))
        lambd, alpha = double(word(words, at + LAMBD_AT)), double(word(words, at + ALPHA_AT))
        t0 = double(word(words, at + T0_AT))
        return lr, lambd, alpha, t0, (flags & IS_CURRENT) != 0

    return plan_of


def _is_skipped(ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that tells whether the gradients were found to be infinite."""
    word, read_float = ops.word, ops.read_real["float32"]

    @ops.function
    def is_skipped(words):
        address = word(words, FOUND_INF_AT)
        if address == 0:
            return False
        return read_float(address) != 0.0

    return is_skipped


def _eta(ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that computes eta after so many steps."""
    add, mul = ops.add, ops.mul

    @ops.function
    def eta_after(step, lr, lambd, alpha, is_current):
        if is_current and step <= 0.0:
            return lr
        return lr / add(1.0, mul(mul(lambd, lr), step)) ** alpha

    return eta_after
