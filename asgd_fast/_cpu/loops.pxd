# What the loops of one SIMD level offer to the engine.

from libc.stdint cimport int64_t, uint16_t

from asgd_fast._rows.rows cimport N_KINDS, Row

# Works on elements [start, stop) of one row.
ctypedef void (*Loop)(const Row *row, int64_t start, int64_t stop) noexcept nogil

# Exchanges two stretches of n numbers of two bytes, or of wider ones taken for such.
ctypedef void (*Swap)(uint16_t *one, uint16_t *other, int64_t n) noexcept nogil

cdef enum:
    LARGEST_NUMBER = 8  # bytes

# By the kind of the params and the size of the averages.
cdef struct Loops:
    Loop update[N_KINDS][LARGEST_NUMBER + 1]
    Loop narrow[N_KINDS][LARGEST_NUMBER + 1]  # the params become their wider averages, rounded
    Swap swap
