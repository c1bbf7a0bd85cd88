"""The loops of _loops.pxi for any processor that the compiler's defaults allow."""

include "_loops.pxi"
