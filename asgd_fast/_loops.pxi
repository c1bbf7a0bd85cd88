# The CPU's update of one row. This is the formula, and every other place that computes it has these
# bits (DESIGN: Numerics contract); it knows addresses, a length and scalars, nothing else.
#
# The text is compiled once for each SIMD level (_loops_*.pyx) with that level's flags (setup.py).
# Each operation rounds once, and a product is fused with a sum only where fma is written.

from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport fma, fmaf
from libc.stdint cimport int64_t, uint16_t, uint32_t

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


# float16 and bfloat16 are computed in float32, in blocks that stay in the nearest cache.
cdef enum:
    BLOCK = 256

# float32 values beside their bits.
cdef union Block:
    float values[BLOCK]
    uint32_t bits[BLOCK]

ctypedef void (*Widen)(const uint16_t *halves, Block *block, int64_t n) noexcept nogil
ctypedef void (*Narrow)(Block *block, uint16_t *halves, int64_t n) noexcept nogil


cdef inline void _update_halves(
    const Row *row, Widen widen, Narrow narrow, int64_t start, int64_t stop,
) noexcept nogil:
    cdef uint16_t *param = <uint16_t *>row.param
    cdef const uint16_t *grad = <const uint16_t *>row.grad
    cdef uint16_t *ax = <uint16_t *>row.ax
    cdef Block p, g, average
    cdef float *averages = NULL if ax == NULL else average.values
    cdef int64_t n
    while start < stop:
        n = min(stop - start, <int64_t>BLOCK)
        widen(param + start, &p, n)
        widen(grad + start, &g, n)
        if ax != NULL and row.mu != 1:
            widen(ax + start, &average, n)
        _update(row, p.values, <const float *>g.values, averages, 0, n)
        narrow(&p, param + start, n)
        if ax != NULL:
            narrow(&average, ax + start, n)
        start += n


cdef inline void _widen_bfloat16(const uint16_t *halves, Block *block, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        block.bits[i] = <uint32_t>halves[i] << 16


cdef inline void _narrow_bfloat16(Block *block, uint16_t *halves, int64_t n) noexcept nogil:
    """Round to nearest, ties to even; a nan stays one."""
    cdef int64_t i
    cdef uint32_t bits, rounded
    for i in range(n):
        bits = block.bits[i]
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        halves[i] = <uint16_t>(
            (bits >> 16) | 0x40 if (bits & 0x7FFFFFFF) > 0x7F800000 else rounded)


cdef extern from *:
    """
    #if defined(__F16C__) || (defined(_MSC_VER) && defined(__AVX2__))
      #include <immintrin.h>
      #define ASGD_FAST_F16C 1
      static inline void asgd_fast_widen8(const uint16_t *halves, float *values) {
          __m128i bits = _mm_loadu_si128((const __m128i *)halves);
          _mm256_storeu_ps(values, _mm256_cvtph_ps(bits));
      }
      static inline void asgd_fast_narrow8(const float *values, uint16_t *halves) {
          __m256 wide = _mm256_loadu_ps(values);
          _mm_storeu_si128((__m128i *)halves, _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
      }
    #else
      #define ASGD_FAST_F16C 0
      #define asgd_fast_widen8(halves, values) ((void)0)
      #define asgd_fast_narrow8(values, halves) ((void)0)
    #endif
    """
    bint _has_f16c "ASGD_FAST_F16C"
    void _widen8 "asgd_fast_widen8"(const uint16_t *halves, float *values) noexcept nogil
    void _narrow8 "asgd_fast_narrow8"(const float *values, uint16_t *halves) noexcept nogil


cdef inline void _widen_float16(const uint16_t *halves, Block *block, int64_t n) noexcept nogil:
    """Move the exponent's bias from 15 to 127; a subnormal, too small for that, becomes normal."""
    cdef Block subnormal
    cdef int64_t i, start = n - n % 8 if _has_f16c else 0
    cdef uint32_t magnitude, normal, bits
    for i in range(0, start, 8):
        _widen8(halves + i, block.values + i)
    for i in range(start, n):
        # 2**-14 with the subnormal's digits behind it, minus 2**-14 below: exact.
        subnormal.bits[i] = ((<uint32_t>halves[i] & 0x03FF) << 13) + (113 << 23)
    for i in range(start, n):
        subnormal.values[i] = subnormal.values[i] - <float>6.103515625e-05
    for i in range(start, n):
        magnitude = (<uint32_t>halves[i] & 0x7FFF) << 13
        normal = magnitude + (112 << 23)
        bits = subnormal.bits[i] if magnitude < (1 << 23) else normal
        bits = magnitude + (224 << 23) if magnitude >= (31 << 23) else bits  # infinities, nans
        block.bits[i] = bits | ((<uint32_t>halves[i] & 0x8000) << 16)


cdef inline void _narrow_float16(Block *block, uint16_t *halves, int64_t n) noexcept nogil:
    """Round to nearest, ties to even; what is too large becomes infinite, and a nan stays one."""
    cdef Block subnormal
    cdef int64_t i, start = n - n % 8 if _has_f16c else 0
    cdef uint32_t magnitude, normal, special, bits
    for i in range(0, start, 8):
        _narrow8(block.values + i, halves + i)
    for i in range(start, n):
        subnormal.bits[i] = block.bits[i] & 0x7FFFFFFF
    for i in range(start, n):
        # The last digit of 0.5 is the last of a float16 subnormal, so the sum rounds to it.
        subnormal.values[i] = subnormal.values[i] + <float>0.5
    for i in range(start, n):
        magnitude = block.bits[i] & 0x7FFFFFFF
        normal = (magnitude - (112 << 23) + 0x0FFF + ((magnitude >> 13) & 1)) >> 13
        special = 0x7E00 if magnitude > 0x7F800000 else 0x7C00
        bits = normal if magnitude < (143 << 23) else special
        bits = subnormal.bits[i] - (126 << 23) if magnitude < (113 << 23) else bits
        halves[i] = <uint16_t>(bits | ((block.bits[i] >> 16) & 0x8000))


cdef void _update_float32(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update(row, <float *>row.param, <const float *>row.grad, <float *>row.ax, start, stop)


cdef void _update_float64(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update(row, <double *>row.param, <const double *>row.grad, <double *>row.ax, start, stop)


cdef void _update_float16(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update_halves(row, _widen_float16, _narrow_float16, start, stop)


cdef void _update_bfloat16(const Row *row, int64_t start, int64_t stop) noexcept nogil:
    _update_halves(row, _widen_bfloat16, _narrow_bfloat16, start, stop)


cdef Loops _loops
_loops.float32 = _update_float32
_loops.float64 = _update_float64
_loops.float16 = _update_float16
_loops.bfloat16 = _update_bfloat16

loops = PyCapsule_New(&_loops, b"asgd_fast.loops", NULL)
