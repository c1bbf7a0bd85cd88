"""The CPU engine: runs the rows of a table and advances the scalars that go with them.

This module knows addresses, lengths and scalars; it does not know arrays, groups or optimizers. The
loops themselves stand in _loops.pxi, compiled once for each SIMD level; the best level that this
build has and this processor supports is chosen on import.
"""

import os
from importlib import import_module

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.string cimport memcpy

from asgd_fast._dlpack cimport kDLBfloat
from asgd_fast._loops cimport Loop, Loops
from asgd_fast._table cimport Row, Table

cdef extern from *:
    """
    #if defined(_MSC_VER) && defined(_M_X64)
      #include <windows.h>
      /* The numbers of AVX2 and AVX-512F; every AVX2 processor has FMA and F16C. */
      #define ASGD_FAST_CPU_HAS_AVX2 IsProcessorFeaturePresent(40)
      #define ASGD_FAST_CPU_HAS_AVX512 IsProcessorFeaturePresent(41)
    #elif defined(__x86_64__) && defined(__GNUC__)
      #include <cpuid.h>
      static int asgd_fast_has_f16c(void) {  /* a name that older compilers do not know */
          unsigned a, b, c, d;
          return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
      }
      #define ASGD_FAST_CPU_HAS_AVX2 \\
        (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && asgd_fast_has_f16c())
      #define ASGD_FAST_CPU_HAS_AVX512 \\
        (ASGD_FAST_CPU_HAS_AVX2 && __builtin_cpu_supports("avx512f") && \\
         __builtin_cpu_supports("avx512vl") && \\
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    #else
      #define ASGD_FAST_CPU_HAS_AVX2 0
      #define ASGD_FAST_CPU_HAS_AVX512 0
    #endif

    #define ASGD_FAST_TEXT_(x) #x
    #define ASGD_FAST_TEXT(x) ASGD_FAST_TEXT_(x)
    #if defined(__clang__)
      #define ASGD_FAST_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
      #define ASGD_FAST_COMPILER "gcc " __VERSION__
    #elif defined(_MSC_VER)
      #define ASGD_FAST_COMPILER "msvc " ASGD_FAST_TEXT(_MSC_FULL_VER)
    #else
      #define ASGD_FAST_COMPILER "unknown"
    #endif
    """
    bint _cpu_has_avx2 "ASGD_FAST_CPU_HAS_AVX2"
    bint _cpu_has_avx512 "ASGD_FAST_CPU_HAS_AVX512"
    const char *_compiler "ASGD_FAST_COMPILER"
    const char *_cython "ASGD_FAST_CYTHON"
    const char *_flags "ASGD_FAST_FLAGS"
    bint _has_openmp "ASGD_FAST_HAS_OPENMP"

BUILD = {
    "compiler": _compiler.decode(),
    "cython": _cython.decode(),
    "flags": _flags.decode(),
    "openmp": bool(_has_openmp),
}

cdef Loops *_loops = NULL
cdef str _level = ""


def simd_levels():
    """The SIMD levels that this build has and this processor supports, best first.

    Returns
    -------
    list of str
        Of "avx512", "avx2" and "baseline"; the last is always there.
    """
    return [level for level in _supported() if _loops_of(level) is not None]


def simd_level():
    """The SIMD level in use.

    Returns
    -------
    str
    """
    return _level


def use_simd_level(level):
    """Use the loops of another SIMD level; the bits are the same at each.

    Parameters
    ----------
    level : str
        One of `simd_levels`.

    Raises
    ------
    ValueError
        This build or this processor does not have the level.
    """
    global _loops, _level
    loops = _loops_of(level) if level in _supported() else None
    if loops is None:
        raise ValueError(f"SIMD level {level!r} is not available; expected one of {simd_levels()}")
    _loops = <Loops *>PyCapsule_GetPointer(loops, b"asgd_fast.loops")
    _level = level


def _supported():
    """The levels that this processor supports, best first."""
    levels = {"avx512": _cpu_has_avx512, "avx2": _cpu_has_avx2, "baseline": True}
    return [level for level, supported in levels.items() if supported]


def _loops_of(level):
    """The loops of a level that the processor supports, or None where the build lacks them."""
    # Even the import of a level's module runs code of that level.
    try:
        return import_module(f"asgd_fast._loops_{level}").loops
    except ModuleNotFoundError:
        return None


def update(Table table):
    """Update every row of a checked table in place, and advance its scalars.

    Cannot fail. Releases the GIL, and is one call so that no interrupt comes between the two.

    Parameters
    ----------
    table : Table
        With a grad in every row.
    """
    cdef Py_ssize_t i
    cdef Row *row
    cdef Loops *loops = _loops
    with nogil:
        for i in range(table.n_rows):
            row = &table.rows[i]
            _loop_for(row, loops)(row, 0, row.n)
        for i in range(table.n_rows):
            row = &table.rows[i]
            if row.scalars != NULL:
                _store_next(row)


cdef inline Loop _loop_for(const Row *row, const Loops *loops) noexcept nogil:
    if row.dtype.bits == 32:
        return loops.float32
    if row.dtype.bits == 64:
        return loops.float64
    return loops.bfloat16 if row.dtype.code == kDLBfloat else loops.float16


cdef inline void _store_next(const Row *row) noexcept nogil:
    cdef double *doubles = <double *>row.scalars
    cdef float *floats = <float *>row.scalars
    if row.double_scalars:
        doubles[0] = row.next.step
        doubles[1] = row.next.eta
        doubles[2] = row.next.mu
    else:
        floats[0] = <float>row.next.step
        floats[1] = <float>row.next.eta
        floats[2] = <float>row.next.mu


def copy(Table table):
    """Copy each row's grad over its param. Cannot fail; releases the GIL.

    Parameters
    ----------
    table : Table
        With a grad, the source, in every row.
    """
    cdef Py_ssize_t i
    cdef Row *row
    with nogil:
        for i in range(table.n_rows):
            row = &table.rows[i]
            memcpy(row.param, row.grad, row.n * (row.dtype.bits // 8))


use_simd_level(
    os.environ.get("ASGD_FAST_SIMD")
    or next(level for level in _supported() if _loops_of(level) is not None)
)
