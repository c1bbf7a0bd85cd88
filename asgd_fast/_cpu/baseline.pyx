"""The loops of _cpu/loops.pxi for any processor that the compiler's defaults allow."""

include "loops.pxi"
