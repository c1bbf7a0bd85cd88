"""The loops of _loops.pxi for x86-64 processors with AVX-512 (F, VL, DQ, BW)."""

include "_loops.pxi"
