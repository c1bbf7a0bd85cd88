"""The loops of _cpu/loops.pxi for x86-64 processors with AVX-512 (F, VL, DQ, BW)."""

include "loops.pxi"
