"""The loops of _loops.pxi for x86-64 processors with AVX2 and FMA."""

include "_loops.pxi"
