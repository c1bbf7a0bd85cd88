# cython: linetrace=False
# Vectors cannot be traced; the baseline, whose text is the same, has none.
"""The loops of _cpu/loops.pxi for x86-64 processors with AVX2 and FMA."""

include "loops.pxi"
