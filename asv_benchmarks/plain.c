/* Plain loops that move the bytes of a step, as a good compiler makes them: what the memory allows.

   Each computes about what the step computes; the numbers do not matter, the traffic does. */

#include <stdint.h>
#include <string.h>

#define FOR_ALL(n) _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < (n); i++)

#define LOOPS(real)                                                                               \
    void averaging_##real(real *restrict p, const real *restrict g, real *restrict a, int64_t n) { \
        FOR_ALL(n) {                                                                              \
            p[i] = (real)0.999 * p[i] - (real)0.01 * g[i];                                        \
            a[i] = (real)0.9 * a[i] + (real)0.1 * p[i];                                           \
        }                                                                                         \
    }                                                                                             \
    void copying_##real(real *restrict p, const real *restrict g, real *restrict a, int64_t n) {   \
        FOR_ALL(n) a[i] = p[i] = (real)0.999 * p[i] - (real)0.01 * g[i];                          \
    }                                                                                             \
    void stepping_##real(real *restrict p, const real *restrict g, real *restrict a, int64_t n) {  \
        FOR_ALL(n) p[i] = (real)0.999 * p[i] - (real)0.01 * g[i];                                 \
    }

LOOPS(float)
LOOPS(double)

/* Averages that are wider than their params. */
void wide_float(float *restrict p, const float *restrict g, double *restrict a, int64_t n) {
    FOR_ALL(n) {
        p[i] = 0.999f * p[i] - 0.01f * g[i];
        a[i] = 0.9 * a[i] + 0.1 * p[i];
    }
}

static inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline uint16_t truncated(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return (uint16_t)(bits >> 16);
}

void wide_bfloat16(
    uint16_t *restrict p, const uint16_t *restrict g, float *restrict a, int64_t n) {
    FOR_ALL(n) {
        uint16_t x = truncated(0.999f * widened(p[i]) - 0.01f * widened(g[i]));
        p[i] = x;
        a[i] = 0.9f * a[i] + 0.1f * widened(x);
    }
}

void swapping_float(float *restrict p, const float *restrict g, float *restrict a, int64_t n) {
    (void)g;
    FOR_ALL(n) {
        float x = p[i];
        p[i] = a[i];
        a[i] = x;
    }
}
