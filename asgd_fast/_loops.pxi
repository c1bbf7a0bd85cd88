# The CPU's update of one row. This is the formula, and every other place that computes it has these
# bits (DESIGN: Numerics contract); it knows addresses, a length and scalars, nothing else.
#
# The text is compiled once for each SIMD level (_loops_*.pyx) with that level's flags (setup.py).
# Each operation rounds once, and a product is fused with a sum only where fma is written.

from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport fma, fmaf
from libc.stdint cimport int64_t

from asgd_fast._loops cimport Loops
from asgd_fast._table cimport Row

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


cdef inline real _fma(real x, real y, real z) noexcept nogil:
    if real is float:
        return fmaf(x, y, z)
    else:
        return fma(x, y, z)


cdef inline void _update(
    const Row *row, real *param, const real *grad, real *ax, int64_t start, int64_t stop,
) noexcept nogil:
    cdef real neg_eta = <real>-row.eta
    cdef real mu = <real>row.mu
    cdef real decay = <real>row.decay
    cdef real weight_decay = <real>row.weight_decay
    cdef real grad_scale = <real>row.grad_scale
    # As given: the rounded one may be 0, and fma(0, p, g) is not always g.
    cdef bint has_weight_decay = row.weight_decay != 0
    cdef real p
    cdef int64_t i
    if ax == NULL:
        for i in range(start, stop):
            param[i] = _step(
                param[i], grad[i], neg_eta, decay, has_weight_decay, weight_decay, grad_scale)
    elif row.mu == 1:
        for i in range(start, stop):
            p = _step(param[i], grad[i], neg_eta, decay, has_weight_decay, weight_decay, grad_scale)
            param[i] = p
            ax[i] = p
    else:
        for i in range(start, stop):
            p = _step(param[i], grad[i], neg_eta, decay, has_weight_decay, weight_decay, grad_scale)
            param[i] = p
            ax[i] = ax[i] + (p - ax[i]) * mu


cdef inline real _step(
    real p, real g, real neg_eta, real decay, bint has_weight_decay, real weight_decay,
    real grad_scale,
) noexcept nogil:
    # Exact where there is nothing to scale: the factor is then 1, or -1 to maximize.
    g = g * grad_scale
    if has_weight_decay:
        g = _fma(weight_decay, p, g)
    return _fma(neg_eta, g, p * decay)


cdef void _update_float32(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update(row, <float *>row.param, <const float *>row.grad, <float *>row.ax, start, stop)


cdef void _update_float64(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update(row, <double *>row.param, <const double *>row.grad, <double *>row.ax, start, stop)


cdef Loops _loops
_loops.float32 = _update_float32
_loops.float64 = _update_float64

loops = PyCapsule_New(&_loops, b"asgd_fast.loops", NULL)
