# The CPU's update of one row. This is the formula, and every other place that computes it has these
# bits (docs/numerics.md); it knows addresses, a length and scalars, nothing else.
#
# The text is compiled once for each SIMD level (baseline, avx2, avx512.pyx) with that level's flags
# (setup.py).
# Each operation rounds once, and a product is fused with a sum only where fma is written.

from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport NAN, fma, fmaf
from libc.stdint cimport int64_t, uint16_t
from libc.string cimport memcpy, memset

from asgd_fast._cpu.loops cimport Loops
from asgd_fast._rows.rows cimport BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Row
from asgd_fast._schedule cimport Step

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
    float16 _narrow_float16 "asgd_fast_narrow_float16"(float value) noexcept nogil
    bfloat16 _narrow_bfloat16 "asgd_fast_narrow_bfloat16"(float value) noexcept nogil

    # Vectors of the SIMD level; single numbers where it has none. Cython takes them for numbers, as
    # its + and * become those of C; for others than float and double, as fused types must differ.
    ctypedef long double floats "asgd_floats"
    ctypedef long long doubles "asgd_doubles"
    ctypedef struct Unit "asgd_unit":
        floats one
        floats other
    enum:  # how many numbers each has
        UNIT "ASGD_FAST_UNIT"
        FLOATS "ASGD_FAST_FLOATS"
        DOUBLES "ASGD_FAST_DOUBLES"
    floats _all "asgd_fast_all"(float value) noexcept nogil
    doubles _all_doubles "asgd_fast_all_doubles"(double value) noexcept nogil
    floats _fma_floats "asgd_fast_fma"(floats x, floats y, floats z) noexcept nogil
    doubles _part "asgd_fast_part"(floats values, int part) noexcept nogil
    floats _load_floats "asgd_fast_load_floats"(const float *from_) noexcept nogil
    void _store_floats "asgd_fast_store_floats"(float *to, floats values) noexcept nogil
    doubles _load_doubles "asgd_fast_load_doubles"(const double *from_) noexcept nogil
    void _store_doubles "asgd_fast_store_doubles"(double *to, doubles values) noexcept nogil
    floats _load_narrowed "asgd_fast_load_narrowed"(const double *from_) noexcept nogil
    Unit _load_float16 "asgd_fast_load_float16"(const float16 *from_) noexcept nogil
    void _store_float16 "asgd_fast_store_float16"(float16 *to, Unit values) noexcept nogil
    Unit _stored_float16 "asgd_fast_stored_float16"(Unit values) noexcept nogil
    Unit _load_bfloat16 "asgd_fast_load_bfloat16"(const bfloat16 *from_) noexcept nogil
    void _store_bfloat16 "asgd_fast_store_bfloat16"(bfloat16 *to, Unit values) noexcept nogil
    Unit _stored_bfloat16 "asgd_fast_stored_bfloat16"(Unit values) noexcept nogil

ctypedef fused half:
    float16
    bfloat16

ctypedef fused average:  # the numbers of an average of halves
    float16
    bfloat16
    float
    double

ctypedef fused number:  # of a param: one, or a vector of them
    float
    double
    floats

ctypedef fused averaged:  # of an average, likewise
    float
    double
    floats
    doubles


cdef inline number _fma(number x, number y, number z) noexcept nogil:
    if number is float:
        return fmaf(x, y, z)
    elif number is double:
        return fma(x, y, z)
    else:
        return _fma_floats(x, y, z)


cdef inline number _step(
    number p, number g, number neg_eta, number decay, bint has_weight_decay, number weight_decay,
    number grad_scale,
) noexcept nogil:
    # Exact where there is nothing to scale: the factor is then 1, or -1 to maximize.
    g = g * grad_scale
    if has_weight_decay:
        g = _fma(weight_decay, p, g)
    return _fma(neg_eta, g, p * decay)


cdef inline averaged _mean(averaged ax, averaged p, averaged mu) noexcept nogil:
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
            p = _step(
                param[i], grad[i], neg_eta, decay, has_weight_decay, weight_decay, grad_scale)
            param[i] = p
            ax[i] = <mean>p
    else:
        for i in range(n):
            p = _step(
                param[i], grad[i], neg_eta, decay, has_weight_decay, weight_decay, grad_scale)
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


# float16 and bfloat16 are computed in float32. A unit of them stays in vector registers from its
# load to its store: between the two, nothing is an array.


cdef inline void _update_halves(
    const Step *step, half *param, const half *grad, average *ax, int64_t n,
) noexcept nogil:
    """Update n elements; without an average if ax is NULL."""
    cdef half p[UNIT]
    cdef half g[UNIT]
    cdef average a[UNIT]
    cdef int64_t whole = n - n % UNIT
    cdef size_t rest = n - whole
    _update_units(step, param, grad, ax, whole)
    if rest > 0:
        param, grad, ax = param + whole, grad + whole, NULL if ax == NULL else ax + whole
        memset(p, 0, sizeof(p))
        memset(g, 0, sizeof(g))
        memset(a, 0, sizeof(a))
        memcpy(p, param, rest * sizeof(half))
        memcpy(g, grad, rest * sizeof(half))
        if ax != NULL:
            memcpy(a, ax, rest * sizeof(average))
        _update_units(step, p, g, a, UNIT)
        memcpy(param, p, rest * sizeof(half))
        if ax != NULL:
            memcpy(ax, a, rest * sizeof(average))


cdef inline void _update_units(
    const Step *step, half *param, const half *grad, average *ax, int64_t n,
) noexcept nogil:
    """Update n elements, a multiple of UNIT."""
    cdef floats neg_eta = _all(<float>-step.eta)
    cdef floats decay = _all(<float>step.decay)
    cdef floats weight_decay = _all(<float>step.weight_decay)
    cdef floats grad_scale = _all(<float>step.grad_scale)
    cdef bint has_weight_decay = step.weight_decay != 0
    # Read once: for all that a compiler knows, a store might change the step.
    cdef floats mu = _all(<float>step.mu)
    cdef doubles wide_mu = _all_doubles(step.mu)
    cdef bint averages = step.mu != 1
    cdef Unit p
    cdef Unit g
    cdef int64_t _i
    for _i in range(n // UNIT):
        p, g = _load(param), _load(grad)
        p.one = _step(
            p.one, g.one, neg_eta, decay, has_weight_decay, weight_decay, grad_scale)
        p.other = _step(
            p.other, g.other, neg_eta, decay, has_weight_decay, weight_decay, grad_scale)
        _store(param, p)
        if ax != NULL:
            if average is float or average is double:
                p = _stored(p, param)  # a wider average is of what the param has become
                _average_wide(p.one, ax, averages, mu, wide_mu)
                _average_wide(p.other, ax + FLOATS, averages, mu, wide_mu)
            else:
                _average(p, ax, averages, mu)
            ax = ax + UNIT
        param, grad = param + UNIT, grad + UNIT


cdef inline void _average(Unit p, half *ax, bint averages, floats mu) noexcept nogil:
    """Average a unit of params, or copy it."""
    cdef Unit a
    if averages:
        a = _load(<const half *>ax)
        p.one = _mean(a.one, p.one, mu)
        p.other = _mean(a.other, p.other, mu)
    _store(ax, p)


cdef inline void _average_wide(
    floats p, mean *ax, bint averages, floats mu, doubles wide_mu,
) noexcept nogil:
    """Average a vector of params, or copy it."""
    cdef doubles part
    cdef int k
    if mean is float:
        if averages:
            p = _mean(_load_floats(ax), p, mu)
        _store_floats(ax, p)
    else:
        for k in range(FLOATS // DOUBLES):
            part = _part(p, k)
            if averages:
                part = _mean(_load_doubles(ax + k * DOUBLES), part, wide_mu)
            _store_doubles(ax + k * DOUBLES, part)


cdef inline Unit _load(const half *halves) noexcept nogil:
    if half is float16:
        return _load_float16(halves)
    else:
        return _load_bfloat16(halves)


cdef inline void _store(half *halves, Unit values) noexcept nogil:
    if half is float16:
        _store_float16(halves, values)
    else:
        _store_bfloat16(halves, values)


cdef inline Unit _stored(Unit values, const half *_kind) noexcept nogil:
    """What the values become when they are stored, in the order of memory."""
    if half is float16:
        return _stored_float16(values)
    else:
        return _stored_bfloat16(values)


cdef inline void _narrow_halves(half *param, const mean *ax, int64_t n) noexcept nogil:
    cdef Unit unit
    cdef int64_t i = 0
    if half is float16:  # of bfloat16, compilers make vectors
        while n - i >= UNIT:
            unit.one, unit.other = _load_means(ax + i), _load_means(ax + i + FLOATS)
            _store(param + i, unit)
            i += UNIT
        for i in range(i, n):
            param[i] = _narrow_float16(<float>ax[i])
    else:
        for i in range(n):
            param[i] = _narrow_bfloat16(<float>ax[i])


cdef inline floats _load_means(const mean *ax) noexcept nogil:
    if mean is float:
        return _load_floats(ax)
    else:
        return _load_narrowed(ax)


cdef void _update_float32(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update_reals(row, <float *>row.param, <const float *>row.grad, <float *>row.ax, start, stop)


cdef void _update_float32_wide(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update_reals(row, <float *>row.param, <const float *>row.grad, <double *>row.ax, start, stop)


cdef void _update_float64(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update_reals(row, <double *>row.param, <const double *>row.grad, <double *>row.ax, start, stop)


cdef inline void _update_any_halves(
    const Row *row, const Step *step, half *param, const half *grad, int64_t start, int64_t stop,
) noexcept nogil:
    cdef int64_t n = stop - start
    param, grad = param + start, grad + start
    if row.ax == NULL:
        _update_halves(step, param, grad, <half *>NULL, n)
    elif row.ax_size == sizeof(half):
        _update_halves(step, param, grad, <half *>row.ax + start, n)
    elif row.ax_size == sizeof(float):
        _update_halves(step, param, grad, <float *>row.ax + start, n)
    else:
        _update_halves(step, param, grad, <double *>row.ax + start, n)


cdef inline void _narrow_any_halves(
    const Row *row, half *param, int64_t start, int64_t stop,
) noexcept nogil:
    if row.ax_size == sizeof(float):
        _narrow_halves(param + start, <const float *>row.ax + start, stop - start)
    else:
        _narrow_halves(param + start, <const double *>row.ax + start, stop - start)


cdef void _update_float16(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update_any_halves(
        row, row.step, <float16 *>row.param, <const float16 *>row.grad, start, stop)


cdef void _update_bfloat16(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    cdef Step step = row.step[0]
    step.eta = _plain(step.eta)
    step.mu = _plain(step.mu)
    step.decay = _plain(step.decay)
    step.weight_decay = _plain(step.weight_decay)
    step.grad_scale = _plain(step.grad_scale)
    _update_any_halves(
        row, &step, <bfloat16 *>row.param, <const bfloat16 *>row.grad, start, stop)


cdef inline double _plain(double scalar) noexcept nogil:
    """The scalar; a nan loses its payload, as asgd_fast_rounded_bfloat16 needs it."""
    return scalar if scalar == scalar else NAN


cdef void _narrow_to_float32(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _narrow_reals(row, <float *>row.param, <const double *>row.ax, start, stop)


cdef void _narrow_to_float16(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _narrow_any_halves(row, <float16 *>row.param, start, stop)


cdef void _narrow_to_bfloat16(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _narrow_any_halves(row, <bfloat16 *>row.param, start, stop)


cdef void _swap(uint16_t *one, uint16_t *other, int64_t n) noexcept nogil:
    cdef uint16_t kept
    cdef int64_t i
    for i in range(n):
        kept = one[i]
        one[i] = other[i]
        other[i] = kept


cdef Loops _loops
_loops.swap = _swap
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
