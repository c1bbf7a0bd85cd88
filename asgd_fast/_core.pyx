"""The CPU engine: updates the rows of a step in parallel, and advances their scalars.

This module knows addresses, lengths and scalars; it does not know arrays, groups or optimizers. The
loops themselves stand in _cpu/loops.pxi, compiled once for each SIMD level. The best level that
this build has and this processor supports is chosen on import.
"""

import os
from importlib import import_module

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int64_t, uint16_t, uintptr_t
from libc.string cimport memcpy

from asgd_fast._cpu.loops cimport Loops
from asgd_fast._rows.rows cimport CACHE_LINE, CPU, N_KINDS, Mirror, Row, Rows, size_of

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

cdef extern from "<fenv.h>":
    ctypedef struct fenv_t:
        pass
    int fegetenv(fenv_t *environment) noexcept nogil
    int fesetenv(const fenv_t *environment) noexcept nogil

cdef extern from *:
    """
    #if defined(_MSC_VER) && !defined(__clang__)
      #include <intrin.h>
      #define asgd_fast_add(counter, n) _InterlockedExchangeAdd64(counter, n)
    #else
      #define asgd_fast_add(counter, n) __atomic_fetch_add(counter, n, __ATOMIC_RELAXED)
    #endif
    """
    int64_t _add "asgd_fast_add"(int64_t *counter, int64_t n) noexcept nogil

BUILD = {
    "compiler": _compiler.decode(),
    "cython": _cython.decode(),
    "flags": _flags.decode(),
}

# The most that a thread takes at a time, in bytes of params. With 64 KiB, threads work so close to
# each other that they lose a tenth of the memory's bandwidth; with 1 MiB nothing.
cdef enum:
    LARGEST_CHUNK = 1 << 20

cdef enum:
    MOST_THREADS = 128

# The interface of GNU's OpenMP runtime, which LLVM's and Intel's have too: one function calls
# another in so many threads and waits for all of them, one tells the number of a thread.
ctypedef void (*Task)(void *) noexcept nogil
ctypedef void (*Fork)(
    Task task, void *data, unsigned int n_threads, unsigned int flags) noexcept nogil

ctypedef int (*ThreadNumber)() noexcept nogil

cdef Fork _fork = NULL
cdef ThreadNumber _thread_number = NULL

cdef Loops *_loops = NULL
cdef str _level = ""


def simd_levels():
    """The SIMD levels that this build has and this processor supports, best first.

    They are of "avx512", "avx2" and "baseline"; the last is always there.
    """
    return [level for level in _supported() if _loops_of(level) is not None]


def simd_level():
    """The SIMD level in use."""
    return _level


def use_simd_level(level):
    """Use the loops of another of the `simd_levels`; the bits are the same at each."""
    global _loops, _level
    cdef Loops *found
    loops = _loops_of(level) if level in _supported() else None
    if loops is None:
        raise ValueError(f"SIMD level {level!r} is not available; expected one of {simd_levels()}")
    found = <Loops *>PyCapsule_GetPointer(loops, b"asgd_fast.loops")
    _check_complete(found)
    _loops, _level = found, level


cdef _check_complete(const Loops *loops):
    """Raise SystemError if there are params that rows may have, and no loop for them."""
    cdef int kind, ax_size
    for kind in range(N_KINDS):
        for ax_size in (2, 4, 8):
            if ax_size < size_of(kind):
                continue
            if loops.update[kind][ax_size] == NULL or (
                    ax_size != size_of(kind) and loops.narrow[kind][ax_size] == NULL):
                raise SystemError(f"no loop for kind {kind} with averages of {ax_size} bytes")


def _supported():
    """The levels that this processor supports, best first."""
    levels = {"avx512": _cpu_has_avx512, "avx2": _cpu_has_avx2, "baseline": True}
    return [level for level, supported in levels.items() if supported]


def _loops_of(level):
    """The loops of a level that the processor supports, or None where the build lacks them."""
    # Even the import of a level's module runs code of that level.
    try:
        return import_module(f"asgd_fast._cpu.{level}").loops
    except ModuleNotFoundError:
        return None


def use_runtime(uintptr_t fork, uintptr_t thread_number):
    """Make parallel regions by the two functions of an OpenMP runtime that stand above."""
    global _fork, _thread_number
    _fork = <Fork>fork
    _thread_number = <ThreadNumber>thread_number


cdef struct Region

# Does what is to be done to elements [start, stop) of a row.
ctypedef void (*Job)(
    const Region *region, const Row *row, int64_t start, int64_t stop) noexcept nogil

# What all threads of a parallel region share.
cdef struct Region:
    Job job
    const Row *rows
    Py_ssize_t n_rows
    int64_t size          # in bytes of params, each as whole cache lines
    const Loops *loops
    fenv_t environment    # how the caller's thread rounds and whether it flushes subnormal numbers
    int n_shares          # one for each thread
    int64_t share         # in bytes
    int64_t chunk         # what a thread takes at a time
    int64_t taken[MOST_THREADS][8]  # of each share, in a cache line of its own


def update(Rows rows, unsigned int n_threads=1, begin=None):
    """Update every row, which has a grad, in place, once they are checked; advance the scalars.

    Cannot fail. Releases the GIL, and is one call so that no interrupt comes between the two.
    Before `use_runtime` there is one thread. `begin` is called first, and no interrupt comes after
    it; where it raises, nothing is updated.
    """
    if begin is not None:
        begin()
    with nogil:
        _run(rows, _update, n_threads)
        _advance(rows)


def exchange(Rows rows, bytearray is_done, unsigned int n_threads=1, others=None):
    """Put the average of each row into its param; or, where that is done, the param back.

    Cannot fail. Releases the GIL, and is one call so that no interrupt comes between the exchange
    and its note.

    Parameters
    ----------
    rows : Rows
        With an average in every row. It gets the param; where it is wider, the grad, which must be
        writable, gets the param instead.
    is_done : bytearray of length 1
        Whether the averages are in the params; changed.
    n_threads : int
    others : callable, optional
        Does the same to rows of other engines; called first. It does not run Python code. What it
        returns is returned.
    """
    cdef Job job = _put_back if is_done[0] else _put_average
    result = others() if others is not None else None
    with nogil:
        _run(rows, job, n_threads)
    is_done[0] ^= 1
    return result


def assign(Rows rows, unsigned int n_threads=1):
    """Make each row's param its average, which it has, rounded. Cannot fail; releases the GIL."""
    with nogil:
        _run(rows, _assign, n_threads)


cdef void _run(Rows rows, Job job, unsigned int n_threads) noexcept nogil:
    cdef Region region
    region.job = job
    region.rows = rows.rows
    region.n_rows = rows.n_rows
    region.size = rows.cpu_bytes
    region.loops = _loops
    if n_threads > 1 and _fork != NULL:
        _share_out(&region, min(n_threads, <unsigned int>MOST_THREADS))
        fegetenv(&region.environment)
        _fork(_take_chunks, &region, n_threads, 0)
    else:
        _do_part(&region, 0, region.size)


cdef void _update(const Region *region, const Row *row, int64_t start, int64_t stop) noexcept nogil:
    region.loops.update[row.kind][row.ax_size](row, start, stop)


cdef void _assign(const Region *region, const Row *row, int64_t start, int64_t stop) noexcept nogil:
    cdef int64_t size = size_of(row.kind)
    if row.ax_size != size:
        region.loops.narrow[row.kind][row.ax_size](row, start, stop)
    else:
        memcpy(
            <char *>row.param + start * size, <char *>row.ax + start * size, (stop - start) * size)


cdef void _put_average(
    const Region *region, const Row *row, int64_t start, int64_t stop,
) noexcept nogil:
    cdef int64_t size = size_of(row.kind)
    if row.ax_size != size:
        memcpy(
            <char *>row.grad + start * size, <char *>row.param + start * size,
            (stop - start) * size)
        _assign(region, row, start, stop)
    else:
        _swap(region, row, start, stop)


cdef void _put_back(
    const Region *region, const Row *row, int64_t start, int64_t stop,
) noexcept nogil:
    cdef int64_t size = size_of(row.kind)
    if row.ax_size != size:
        memcpy(
            <char *>row.param + start * size, <char *>row.grad + start * size,
            (stop - start) * size)
    else:
        _swap(region, row, start, stop)


cdef void _swap(const Region *region, const Row *row, int64_t start, int64_t stop) noexcept nogil:
    cdef int64_t size = size_of(row.kind)
    region.loops.swap(
        <uint16_t *>(<char *>row.param + start * size),
        <uint16_t *>(<char *>row.ax + start * size), (stop - start) * size // 2)


cdef void _take_chunks(void *data) noexcept nogil:
    """Update the chunks of one share, then what is left of the others, as one of the threads.

    The share is the same in each step, and so may still be in the thread's own cache; a thread that
    comes late, or never, finds its own done by the others.
    """
    cdef Region *region = <Region *>data
    cdef int64_t *taken
    cdef fenv_t own
    cdef int64_t start, first, stop
    cdef int number = _thread_number(), i
    fegetenv(&own)
    fesetenv(&region.environment)
    for i in range(region.n_shares):
        first = (number + i) % region.n_shares * region.share
        taken = region.taken[(number + i) % region.n_shares]
        stop = min(first + region.share, region.size)
        start = first + _add(taken, region.chunk)
        while start < stop:
            _do_part(region, start, min(start + region.chunk, stop))
            start = first + _add(taken, region.chunk)
    fesetenv(&own)


cdef void _share_out(Region *region, int n_shares) noexcept nogil:
    """Cut the work into equal shares of equal chunks."""
    cdef int i
    region.n_shares = n_shares
    region.share = _lines(region.size, n_shares)
    region.chunk = _lines(region.share, region.share // LARGEST_CHUNK + 1)
    for i in range(n_shares):
        region.taken[i][0] = 0


cdef inline int64_t _lines(int64_t size, int64_t n) noexcept nogil:
    """An n-th of a size, rounded up to whole cache lines; one at least."""
    return max(<int64_t>1, (size + n * CACHE_LINE - 1) // (n * CACHE_LINE)) * CACHE_LINE


cdef void _do_part(const Region *region, int64_t start, int64_t stop) noexcept nogil:
    """Do the job to the bytes [start, stop) of the work, both multiples of a cache line."""
    cdef Py_ssize_t i = _row_at(region, start)
    cdef const Row *row
    cdef int64_t size
    while i < region.n_rows and region.rows[i].offset < stop:
        row = &region.rows[i]
        size = size_of(row.kind)
        if row.device == CPU:
            region.job(
                region, row, max(start - row.offset, <int64_t>0) // size,
                min((stop - row.offset) // size, row.n))
        i += 1


cdef Py_ssize_t _row_at(const Region *region, int64_t offset) noexcept nogil:
    """The last row that begins at `offset` or before."""
    cdef Py_ssize_t low = 0, high = region.n_rows, middle
    while high - low > 1:
        middle = (low + high) // 2
        if region.rows[middle].offset <= offset:
            low = middle
        else:
            high = middle
    return low


cdef void _advance(Rows rows) noexcept nogil:
    """Advance the scalars of all rows."""
    cdef Py_ssize_t i
    cdef const Row *row
    cdef const Mirror *mirror
    cdef const double *values
    cdef int k
    for i in range(rows.n_rows):
        row = &rows.rows[i]
        if row.scalars != NULL:
            row.scalars[0] = row.step.next
    for i in range(rows.n_mirrors):
        mirror = &rows.mirrors[i]
        values = <const double *>mirror.scalars
        for k in range(3):
            if mirror.is_double[k]:
                (<double *>mirror.to[k])[0] = values[k]
            else:
                (<float *>mirror.to[k])[0] = <float>values[k]


def copy(Rows rows):
    """Copy each row's grad, which it has, over its param. Cannot fail; releases the GIL."""
    cdef Py_ssize_t i
    cdef Row *row
    with nogil:
        for i in range(rows.n_rows):
            row = &rows.rows[i]
            if row.device == CPU:
                memcpy(row.param, row.grad, row.n * size_of(row.kind))


use_simd_level(
    os.environ.get("ASGD_FAST_SIMD")
    or next(level for level in _supported() if _loops_of(level) is not None)
)
