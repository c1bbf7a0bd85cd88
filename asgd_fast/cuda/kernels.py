"""The GPU's kernels: what each thread of each block does with the rows of a launch.

The grid has one block for each chunk of each array. A block finds its chunk by the kernel's
parameters (`_chunk_map`); its threads go through the chunk in a block-stride loop of vectorised
accesses (`_block_stride`), and do the formula to each vector (`_update_unit`). If step, eta and mu
are in the GPU's memory, the last block advances them (`kernel`).

The functions that return functions are templates: of the kind of a kernel, and of the operations of
a target. The same text is compiled for the GPU and for the CPU (`twin`), and runs as it is in
Numba's simulator, so that its bits, those of _cpu/loops.pxi, are checked without a GPU. This module
does not know how a kernel is compiled or launched, nor who writes the words: see `launches`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from numba import cuda, types

from asgd_fast.cuda import launches as layout
from asgd_fast.cuda import recurrence
from asgd_fast.cuda.intrinsics import ACCESS, SIZES, computed
from asgd_fast.cuda.launches import AVERAGE, COPY, HEADER, NO_AVERAGE, SKIP, SWAP, THREADS

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
    make = {"update": _update, "exchange": _exchange, "assign": _assign}[kind.job]
    return Jobs(make(kind, ops), _advance(kind, ops) if kind.device_scalars else None)


def kernel(kind: Kind, ops: SimpleNamespace) -> Callable[[Any], None]:
    """Return a kernel, a function of its words, for Numba to compile."""
    do_chunk, finish = jobs_of(kind, ops)
    word, ticket = ops.word, ops.ticket

    def run(words):
        thread = types.int64(cuda.threadIdx.x)
        do_chunk(words, types.int64(cuda.blockIdx.x), thread)
        if finish is not None:
            # The last block to get here finishes: all others have read what it changes.
            cuda.syncthreads()
            others = cuda.gridDim.x - 1
            is_last = False
            if thread == 0:
                is_last = ticket(word(words, layout.TICKET_AT), types.int64(others)) == others
            if cuda.syncthreads_or(types.int32(is_last)):
                finish(words, thread)

    return run


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


def _update(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that updates a chunk with the scalars of its row."""
    chunk_of, scalars_of = _chunk_map(kind, ops), _scalars(kind, ops)
    for_each = _block_stride(kind, ops, lambda *form: _update_unit(kind, ops, *form))

    @ops.function
    def do_chunk(words, block, thread):
        row, param, grad, ax, n = chunk_of(words, block)
        phase, scalars = scalars_of(words, row, ax)
        if phase != SKIP:
            for_each(param, grad, ax, n, thread, phase, scalars)

    return do_chunk


def _update_unit(kind: Kind, ops: SimpleNamespace, *form: int) -> Callable[..., Any]:
    """Return the function that updates a vector: the formula, each line rounded once."""
    load, store = ops.memory(kind.param, *form)
    load_ax, store_ax = ops.memory(kind.average, *form)
    add, sub, mul, fma, select = ops.add, ops.sub, ops.mul, ops.fma, ops.select
    widen, rounded = ops.convert(computed(kind.average)), ops.rounded(kind.param)
    is_wide = kind.average != kind.param

    @ops.function
    def update(param, grad, ax, i, phase, scalars):
        neg_eta, decay, has_weight_decay, weight_decay, grad_scale, mu = scalars
        p = load(param, i)
        g = load(grad, i)
        a = load_ax(ax, i) if phase == AVERAGE else widen(p)
        g = mul(g, grad_scale)
        g = select(has_weight_decay, fma(weight_decay, p, g), g)
        p = fma(neg_eta, g, mul(p, decay))
        store(param, i, p)
        if is_wide:  # the average is of what the param has become
            p = rounded(p)
        if phase == AVERAGE:
            store_ax(ax, i, add(a, mul(sub(widen(p), a), mu)))
        elif phase == COPY:
            store_ax(ax, i, widen(p))

    return update


def _exchange(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that swaps params and averages, or copies grads over params, in bits."""
    word, chunk_of = ops.word, _chunk_map(kind, ops)

    def unit(*form: int) -> Callable[..., Any]:
        load, store = ops.memory(kind.param, *form)

        @ops.function
        def exchange(param, other, ax, i, phase, swaps):
            p = load(param, i)
            store(param, i, load(other, i))
            if swaps:
                store(other, i, p)

        return exchange

    for_each = _block_stride(kind, ops, unit)

    @ops.function
    def do_chunk(words, block, thread):
        _, param, grad, ax, n = chunk_of(words, block)
        if word(words, layout.JOB_AT) == SWAP:
            for_each(param, ax, 0, n, thread, NO_AVERAGE, True)
        else:
            for_each(param, grad, 0, n, thread, NO_AVERAGE, False)

    return do_chunk


def _assign(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that assigns averages to params that are narrower."""
    chunk_of, narrow = _chunk_map(kind, ops), ops.convert(computed(kind.param))

    def unit(*form: int) -> Callable[..., Any]:
        load, _ = ops.memory(kind.average, *form)
        _, store = ops.memory(kind.param, *form)

        @ops.function
        def assign(param, grad, ax, i, phase, scalars):
            store(param, i, narrow(load(ax, i)))

        return assign

    for_each = _block_stride(kind, ops, unit)

    @ops.function
    def do_chunk(words, block, thread):
        _, param, _, ax, n = chunk_of(words, block)
        for_each(param, param, ax, n, thread, NO_AVERAGE, 0)

    return do_chunk


def _chunk_map(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that finds the chunk of a block: row, addresses, length."""
    word, row_size = ops.word, layout.row_words(kind.device_scalars)
    size, ax_size = SIZES[kind.param], SIZES[kind.average]
    first_mask, tail_mask = (1 << layout.FIRST_BITS) - 1, (1 << layout.TAIL_BITS) - 1

    @ops.function
    def first_of(words, i):
        return word(words, HEADER + i * row_size + layout.PLACE_AT) & first_mask

    @ops.function
    def chunk_of(words, block):
        # Bisection for the last row that begins at this block or before.
        n_rows = word(words, layout.N_ROWS_AT)
        low, high = 0, n_rows
        while high - low > 1:
            middle = (low + high) >> 1
            if first_of(words, middle) <= block:
                low = middle
            else:
                high = middle
        row = HEADER + low * row_size
        place = word(words, row + layout.PLACE_AT)
        n = word(words, layout.CHUNK_AT)
        start = (block - (place & first_mask)) * n
        stop = first_of(words, high) if high < n_rows else word(words, layout.N_CHUNKS_AT)
        if block + 1 >= stop:
            n = (place >> layout.FIRST_BITS) & tail_mask
        param = word(words, row) + start * size
        grad = word(words, row + 1) + start * size
        ax = word(words, row + 2)
        if ax != 0:
            ax += start * ax_size
        return row, param, grad, ax, n

    return chunk_of


def _block_stride(kind: Kind, ops: SimpleNamespace, unit: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loop of a block's threads over a chunk, by what `unit` makes for a vector.

    The vectors have 16 bytes, if all arrays are aligned once some numbers are peeled off; else all
    numbers are done singly.
    """
    size, ax_size = SIZES[kind.param], SIZES[kind.average]
    lanes = ACCESS // size
    stride = THREADS * lanes
    # Unrolled twice, to keep more of the memory busy, where the registers have room: eight doubles
    # fill them alone, and scalars on the device take some.
    room = ACCESS if kind.device_scalars else 2 * ACCESS
    parts = 2 if lanes * ax_size <= room else 1
    many, once, singly = unit(lanes, parts, stride), unit(lanes), unit(1)

    @ops.function
    def unrolled(param, grad, ax, i, stop, phase, scalars):
        while i + (parts - 1) * stride < stop:
            many(param, grad, ax, i, phase, scalars)
            i += parts * stride
        return i

    @ops.function
    def for_each(param, grad, ax, n, thread, phase, scalars):
        head = min((-param & (ACCESS - 1)) // size, n)
        ends = (param + head * size) | (grad + head * size)
        if ax != 0:
            ends |= ax + head * ax_size
        if ends & (ACCESS - 1):
            head = n
        tail = (n - head) & (lanes - 1)
        stop = n - tail
        i = head + thread * lanes
        # A loop for each phase: in one for all, the average is loaded after the rest has come.
        if phase == AVERAGE:
            i = unrolled(param, grad, ax, i, stop, AVERAGE, scalars)
        elif phase == COPY:
            i = unrolled(param, grad, ax, i, stop, COPY, scalars)
        else:
            i = unrolled(param, grad, ax, i, stop, NO_AVERAGE, scalars)
        if i < stop:
            once(param, grad, ax, i, phase, scalars)
        i = thread
        while i < head + tail:
            singly(param, grad, ax, i if i < head else i - head + stop, phase, scalars)
            i += THREADS

    return for_each


def _set_of(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that finds the set of scalars of a row."""
    word, set_size = ops.word, layout.set_words(kind.device_scalars)

    @ops.function
    def set_of(words, row):
        number = word(words, row + layout.PLACE_AT) >> layout.SET_SHIFT
        return word(words, layout.SETS_AT) - number * set_size

    return set_of


def _scalars(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that finds the phase of a row, and the scalars of the formula."""
    word, set_of = ops.word, _set_of(kind, ops)
    real, mean = ops.real[computed(kind.param)], ops.real[computed(kind.average)]

    @ops.function
    def from_the_host(words, row, ax):
        at = set_of(words, row)
        how = word(words, at + layout.HOW_AT)
        return how & layout.PHASES, (
            real(word(words, at + layout.NEG_ETA_AT)),
            real(word(words, at + layout.DECAY_AT)),
            (how & layout.HAS_WEIGHT_DECAY) != 0,
            real(word(words, at + layout.WEIGHT_DECAY_AT)),
            real(word(words, at + layout.FACTOR_AT)),
            mean(word(words, at + layout.MU_AT)),
        )

    if not kind.device_scalars:
        return from_the_host

    is_skipped, step_of, _ = recurrence.make(ops)
    to_real, to_mean = (getattr(types, computed(x)) for x in (kind.param, kind.average))

    @ops.function
    def from_the_device(words, row, ax):
        eta, decay, weight_decay, grad_scale, mu = step_of(words, row, set_of(words, row))
        if is_skipped(words):
            phase = SKIP
        elif ax == 0 or mu == 0.0:
            phase = NO_AVERAGE
        else:
            phase = COPY if mu == 1.0 else AVERAGE
        return phase, (
            to_real(-eta),
            to_real(decay),
            weight_decay != 0.0,
            to_real(weight_decay),
            to_real(grad_scale),
            to_mean(mu),
        )

    return from_the_device


def _advance(kind: Kind, ops: SimpleNamespace) -> Callable[..., Any]:
    """Return the function that advances the scalars of all rows, unless the step is skipped."""
    word, set_of, row_size = ops.word, _set_of(kind, ops), layout.row_words(True)
    is_skipped, _, advance = recurrence.make(ops)

    @ops.function
    def finish(words, thread):
        if not is_skipped(words):
            for i in range(thread, word(words, layout.N_ROWS_AT), THREADS):
                row = HEADER + i * row_size
                advance(words, row, set_of(words, row))

    return finish
