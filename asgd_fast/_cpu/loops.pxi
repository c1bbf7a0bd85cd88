# The CPU's update of one row. This is the formula, and every other place that computes it has these
# bits (docs/numerics.md); it knows addresses, a length and scalars, nothing else.
#
# The text is compiled once for each SIMD level (baseline, avx2, avx512.pyx) with that level's flags
# (setup.py).
# Each operation rounds once, and a product is fused with a sum only where fma is written.

from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport fma, fmaf
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from asgd_fast._cpu.loops cimport Loops
from asgd_fast._rows.rows cimport BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Row

cdef extern from *:
    """
    #if defined(_MSC_VER) && !defined(__clang__)
    #pragma fp_contract(off)
    #elif defined(__clang__)
    #pragma STDC FP_CONTRACT OFF
    #endif
    """

ctypedef fused real:
    float
    double

ctypedef fused mean:  # the numbers of an average
    float
    double

cdef extern from "simd.h":
    ctypedef struct float16 "asgd_float16":
        pass
    ctypedef struct bfloat16 "asgd_bfloat16":
        pass
    void _widen_float16 "asgd_fast_widen_float16"(const float16 *, float *) noexcept nogil
    void _narrow_float16 "asgd_fast_narrow_float16"(const float *, float16 *) noexcept nogil
    void _widen_bfloat16 "asgd_fast_widen_bfloat16"(const bfloat16 *, float *) noexcept nogil
    void _narrow_bfloat16 "asgd_fast_narrow_bfloat16"(const float *, bfloat16 *) noexcept nogil

ctypedef fused half:
    float16
    bfloat16

# Elements that are loaded, computed and stored together where they are to stay in registers.
cdef enum:
    UNIT = 16


cdef inline real _fma(real x, real y, real z) noexcept nogil:
    if real is float:
        return fmaf(x, y, z)
    else:
        return fma(x, y, z)


cdef inline real _step(
    real p, real g, real neg_eta, real decay, bint has_weight_decay, real weight_decay,
    real grad_scale,
) noexcept nogil:
    # Exact where there is nothing to scale: the factor is then 1, or -1 to maximize.
    g = g * grad_scale
    if has_weight_decay:
        g = _fma(weight_decay, p, g)
    return _fma(neg_eta, g, p * decay)


cdef inline mean _mean(mean ax, mean p, mean mu) noexcept nogil:
    return ax + (p - ax) * mu


cdef inline void _update(
    const Row *row, real *param, const real *grad, mean *ax, int64_t n,
) noexcept nogil:
    """Update n elements; without an average if ax is NULL."""
    cdef real neg_eta = <real>-row.step.eta
    cdef mean mu = <mean>row.step.mu
    cdef real decay = <real>row.step.decay
    cdef real weight_decay = <real>row.step.weight_decay
    cdef real grad_scale = <real>row.step.grad_scale
    # As given: the rounded one may be 0, and fma(0, p, g) is not always g.
    cdef bint has_weight_decay = row.step.weight_decay != 0
    cdef real p
    cdef int64_t i
    if ax == NULL:
        for i in range(n):
            param[i] = _step(
                param[i], grad[i], neg_eta, decay, has_weight_decay, weight_decay, grad_scale)
    elif row.step.mu == 1:
        for i in range(n):
            p = _step(param[i], grad[i], neg_eta, decay, has_weight_decay, weight_decay, grad_scale)
            param[i] = p
            ax[i] = <mean>p
    else:
        for i in range(n):
            p = _step(param[i], grad[i], neg_eta, decay, has_weight_decay, weight_decay, grad_scale)
            param[i] = p
            ax[i] = _mean(ax[i], <mean>p, mu)


cdef inline void _update_reals(
    const Row *row, real *param, const real *grad, mean *ax, int64_t start, int64_t stop,
) noexcept nogil:
    param, grad, ax = param + start, grad + start, NULL if ax == NULL else ax + start
    _update(row, param, grad, ax, stop - start)


cdef inline void _narrow_reals(
    const Row *row, real *param, const mean *ax, int64_t start, int64_t stop,
) noexcept nogil:
    cdef int64_t i
    for i in range(start, stop):
        param[i] = <real>ax[i]


# float16 and bfloat16 are computed in float32, a unit at a time.

# The scalars of a row, rounded once for all units, and what becomes of the average.
cdef struct Halves:
    float neg_eta
    double mu
    float decay
    float weight_decay
    float grad_scale
    bint has_weight_decay
    bint averages
    bint copies
    int ax_size


cdef inline void _update_halves(
    const Row *row, half *param, const half *grad, int64_t start, int64_t stop,
) noexcept nogil:
    cdef int64_t _i, n = stop - start
    cdef Halves how
    cdef int64_t ax_size = row.ax_size
    cdef char *ax = NULL if row.ax == NULL else <char *>row.ax + start * ax_size
    param, grad = param + start, grad + start
    how.neg_eta = <float>-row.step.eta
    how.mu = row.step.mu
    how.decay = <float>row.step.decay
    how.weight_decay = <float>row.step.weight_decay
    how.grad_scale = <float>row.step.grad_scale
    how.has_weight_decay = row.step.weight_decay != 0
    how.averages = ax != NULL and row.step.mu != 1
    how.copies = ax != NULL and row.step.mu == 1
    how.ax_size = row.ax_size
    for _i in range(n // UNIT):
        _update_unit(&how, param, grad, ax)
        param, grad = param + UNIT, grad + UNIT
        ax = NULL if ax == NULL else ax + UNIT * ax_size
    _update_part(&how, param, grad, ax, n % UNIT)


cdef inline void _update_part(
    const Halves *how, half *param, const half *grad, char *ax, int64_t n,
) noexcept nogil:
    """Update fewer elements than a unit."""
    cdef half p[UNIT]
    cdef half g[UNIT]
    cdef double a[UNIT]
    cdef size_t size = n * sizeof(half)
    if n == 0:
        return
    memset(p, 0, sizeof(p))
    memset(g, 0, sizeof(g))
    memset(a, 0, sizeof(a))
    memcpy(p, param, size)
    memcpy(g, grad, size)
    if ax != NULL:
        memcpy(a, ax, n * how.ax_size)
    _update_unit(how, p, g, <char *>a)
    memcpy(param, p, size)
    if ax != NULL:
        memcpy(ax, a, n * how.ax_size)


cdef inline void _update_unit(
    const Halves *how, half *param, const half *grad, char *ax,
) noexcept nogil:
    cdef float p[UNIT]
    cdef float g[UNIT]
    cdef float a[UNIT]
    cdef half halves[UNIT]
    cdef int i
    _widen(param, p)
    _widen(grad, g)
    for i in range(UNIT):
        p[i] = _step(
            p[i], g[i], how.neg_eta, how.decay, how.has_weight_decay, how.weight_decay,
            how.grad_scale)
    _narrow(p, halves)
    memcpy(param, halves, sizeof(halves))
    if how.ax_size != sizeof(half):
        _widen(halves, p)  # a wider average is of what the param has become
        if how.ax_size == sizeof(float):
            _mean_of_unit(how, p, <float *>ax)
        else:
            _mean_of_unit(how, p, <double *>ax)
    elif how.averages:
        _widen(<half *>ax, a)
        for i in range(UNIT):
            a[i] = _mean(a[i], p[i], <float>how.mu)
        _narrow(a, <half *>ax)
    elif how.copies:
        memcpy(ax, halves, sizeof(halves))


cdef inline void _mean_of_unit(const Halves *how, const float *p, mean *ax) noexcept nogil:
    cdef mean unit[UNIT]
    cdef mean mu = <mean>how.mu
    cdef int i
    # Stores are loops: memcpy moves 16 bytes at a time, and a load of a wider vector waits for it.
    # They are loops of their own: for all that a compiler knows, p might be where ax is.
    if how.averages:
        for i in range(UNIT):
            unit[i] = _mean(ax[i], <mean>p[i], mu)
        for i in range(UNIT):
            ax[i] = unit[i]
    elif how.copies:
        for i in range(UNIT):
            unit[i] = <mean>p[i]
        for i in range(UNIT):
            ax[i] = unit[i]


cdef inline void _narrow_halves(
    const Row *row, half *param, const mean *ax, int64_t start, int64_t stop,
) noexcept nogil:
    cdef float unit[UNIT]
    cdef half halves[UNIT]
    cdef int64_t n
    cdef int i
    memset(unit, 0, sizeof(unit))
    while start < stop:
        n = min(<int64_t>UNIT, stop - start)
        for i in range(n):
            unit[i] = <float>ax[start + i]
        _narrow(unit, halves)
        memcpy(param + start, halves, n * sizeof(half))
        start += n


cdef inline void _widen(const half *halves, float *unit) noexcept nogil:
    if half is float16:
        _widen_float16(halves, unit)
    else:
        _widen_bfloat16(halves, unit)


cdef inline void _narrow(const float *unit, half *halves) noexcept nogil:
    if half is float16:
        _narrow_float16(unit, halves)
    else:
        _narrow_bfloat16(unit, halves)


cdef void _update_float32(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update_reals(row, <float *>row.param, <const float *>row.grad, <float *>row.ax, start, stop)


cdef void _update_float32_wide(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update_reals(row, <float *>row.param, <const float *>row.grad, <double *>row.ax, start, stop)


cdef void _update_float64(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update_reals(row, <double *>row.param, <const double *>row.grad, <double *>row.ax, start, stop)


cdef void _update_float16(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update_halves(row, <float16 *>row.param, <const float16 *>row.grad, start, stop)


cdef void _update_bfloat16(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update_halves(row, <bfloat16 *>row.param, <const bfloat16 *>row.grad, start, stop)


cdef void _narrow_to_float32(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _narrow_reals(row, <float *>row.param, <const double *>row.ax, start, stop)


cdef void _narrow_to_float16(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    if row.ax_size == sizeof(float):
        _narrow_halves(row, <float16 *>row.param, <const float *>row.ax, start, stop)
    else:
        _narrow_halves(row, <float16 *>row.param, <const double *>row.ax, start, stop)


cdef void _narrow_to_bfloat16(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    if row.ax_size == sizeof(float):
        _narrow_halves(row, <bfloat16 *>row.param, <const float *>row.ax, start, stop)
    else:
        _narrow_halves(row, <bfloat16 *>row.param, <const double *>row.ax, start, stop)


cdef Loops _loops
_loops.update[FLOAT32][sizeof(float)] = _update_float32
_loops.update[FLOAT32][sizeof(double)] = _update_float32_wide
_loops.update[FLOAT64][sizeof(double)] = _update_float64
_loops.narrow[FLOAT32][sizeof(double)] = _narrow_to_float32
for _size in (sizeof(float16), sizeof(float), sizeof(double)):
    _loops.update[FLOAT16][_size] = _update_float16
    _loops.update[BFLOAT16][_size] = _update_bfloat16
    _loops.narrow[FLOAT16][_size] = _narrow_to_float16
    _loops.narrow[BFLOAT16][_size] = _narrow_to_bfloat16

loops = PyCapsule_New(&_loops, b"asgd_fast.loops", NULL)
