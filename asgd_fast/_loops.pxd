# What the loops of one SIMD level offer to the engine.

from libc.stdint cimport int64_t

from asgd_fast._table cimport Row

# Updates elements [start, stop) of one row. An average that is only written may be streamed: stored
# past the caches, to be fenced by the caller.
ctypedef void (*Loop)(
    const Row *row, int64_t start, int64_t stop, bint streams) noexcept nogil

cdef struct Loops:
    Loop float32
    Loop float64
    Loop float16
    Loop bfloat16
