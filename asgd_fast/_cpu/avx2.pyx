"""The loops of _cpu/loops.pxi for x86-64 processors with AVX2 and FMA."""

include "loops.pxi"
