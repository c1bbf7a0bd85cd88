/* What compilers do not make of plain loops: half types in vector registers. Every level has the same
   functions, with the same bits. A unit of halves becomes two vectors of floats; which half stands where
   is the half type's own affair, as no element meets another. Where the level has no vectors, a vector
   is one number. */

#ifndef ASGD_FAST_SIMD_H
#define ASGD_FAST_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Types of their own, so that neither is taken for the other. */
typedef struct { uint16_t bits; } asgd_float16;
typedef struct { uint16_t bits; } asgd_bfloat16;

static inline float asgd_fast_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline uint32_t asgd_fast_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float asgd_fast_widen_bfloat16(asgd_bfloat16 half) {
    return asgd_fast_float((uint32_t)half.bits << 16);
}

/* Rounds to nearest, ties to even; a nan stays one. AVX-512 has an instruction for it, which takes
   subnormal numbers for 0. */
static inline asgd_bfloat16 asgd_fast_narrow_bfloat16(float value) {
    uint32_t bits = asgd_fast_bits(value), high = bits >> 16;
    int is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    asgd_bfloat16 half = {
        (uint16_t)(is_nan ? high | 0x40 : (bits + 0x7FFF + (high & 1)) >> 16)};
    return half;
}

/* Moves the exponent's bias from 15 to 127; a subnormal, too small for that, becomes normal. */
static inline float asgd_fast_widen_float16(asgd_float16 half) {
    uint32_t magnitude = ((uint32_t)half.bits & 0x7FFF) << 13;
    /* 2**-14 with the subnormal's digits behind it, minus 2**-14 below: exact. */
    uint32_t subnormal = asgd_fast_bits(
        asgd_fast_float((magnitude & 0x007FFFFF) + (113u << 23)) - 6.103515625e-05f);
    uint32_t bits = magnitude < (1u << 23) ? subnormal : magnitude + (112u << 23);
    if (magnitude >= (31u << 23)) /* infinities, nans */
        bits = magnitude + (224u << 23);
    return asgd_fast_float(bits | ((uint32_t)half.bits & 0x8000) << 16);
}

/* Rounds to nearest, ties to even; what is too large becomes infinite, and a nan stays one. */
static inline asgd_float16 asgd_fast_narrow_float16(float value) {
    uint32_t magnitude = asgd_fast_bits(value) & 0x7FFFFFFF;
    /* The last digit of 0.5 is the last of a float16 subnormal, so the sum rounds to it. */
    uint32_t subnormal = asgd_fast_bits(asgd_fast_float(magnitude) + 0.5f) - (126u << 23);
    uint32_t normal = (magnitude - (112u << 23) + 0x0FFF + ((magnitude >> 13) & 1)) >> 13;
    /* of a nan, its first digits */
    uint32_t special = magnitude > 0x7F800000 ? 0x7E00 | (magnitude >> 13 & 0x3FF) : 0x7C00;
    uint32_t bits = magnitude < (143u << 23) ? normal : special;
    if (magnitude < (113u << 23))
        bits = subnormal;
    asgd_float16 half = {(uint16_t)(bits | ((asgd_fast_bits(value) >> 16) & 0x8000))};
    return half;
}

/* Vectors are the compiler's own, so that one is loaded, computed and stored as a number is: nothing is
   an array between the load and the store, and nothing moves by memcpy, which compilers may cut into
   16 bytes for which a load of 32 then waits. Vectors need all that setup.py asks for at their level;
   CFLAGS may ask for a part of it. */
#if defined(__GNUC__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define ASGD_FAST_VECTOR 64
#define ASGD_FAST_MM(name) _mm512_##name
typedef __m512i asgd_integers;
typedef __m256i asgd_halves;
#define ASGD_FAST_LOW(bits) _mm512_castsi512_si256(bits)
#define ASGD_FAST_HIGH(bits) _mm512_extracti64x4_epi64(bits, 1)
#define ASGD_FAST_LOW_FLOATS(values) _mm512_castps512_ps256(values)
#define ASGD_FAST_HIGH_FLOATS(values) _mm512_extractf32x8_ps(values, 1)
#define ASGD_FAST_JOIN_FLOATS(low, high) \
    _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)
#else
#define ASGD_FAST_VECTOR 32
#define ASGD_FAST_MM(name) _mm256_##name
typedef __m256i asgd_integers;
typedef __m128i asgd_halves;
#define ASGD_FAST_LOW(bits) _mm256_castsi256_si128(bits)
#define ASGD_FAST_HIGH(bits) _mm256_extracti128_si256(bits, 1)
#define ASGD_FAST_LOW_FLOATS(values) _mm256_castps256_ps128(values)
#define ASGD_FAST_HIGH_FLOATS(values) _mm256_extractf128_ps(values, 1)
#define ASGD_FAST_JOIN_FLOATS(low, high) \
    _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1)
#endif

#define ASGD_FAST_FLOATS (ASGD_FAST_VECTOR / 4)
#define ASGD_FAST_DOUBLES (ASGD_FAST_VECTOR / 8)
typedef float asgd_floats __attribute__((vector_size(ASGD_FAST_VECTOR)));
typedef double asgd_doubles __attribute__((vector_size(ASGD_FAST_VECTOR)));
typedef uint32_t asgd_words __attribute__((vector_size(ASGD_FAST_VECTOR)));
typedef struct { asgd_floats one, other; } asgd_unit;

/* The same where memory need only be aligned to the elements. */
typedef asgd_floats asgd_loose_floats __attribute__((aligned(4), may_alias));
typedef asgd_doubles asgd_loose_doubles __attribute__((aligned(8), may_alias));
typedef asgd_words asgd_loose_words __attribute__((aligned(2), may_alias));
typedef asgd_halves asgd_loose_halves __attribute__((aligned(2), may_alias));

/* Asks the memory for what comes 2 KiB later: a core has not room for so many instructions on halves as
   would keep its memory busy. One thread gained a tenth (Zen 3, 10 million bfloat16). */
static inline void asgd_fast_ask(const void *address) {
    __builtin_prefetch((const void *)((uintptr_t)address + 2048));
}

static inline asgd_floats asgd_fast_all(float value) {
    return value - (asgd_floats){0};
}

static inline asgd_doubles asgd_fast_all_doubles(double value) {
    return value - (asgd_doubles){0};
}

static inline asgd_floats asgd_fast_fma(asgd_floats x, asgd_floats y, asgd_floats z) {
    return ASGD_FAST_MM(fmadd_ps)(x, y, z);
}

/* The first or the second half of a vector. */
static inline asgd_doubles asgd_fast_part(asgd_floats values, int part) {
    return ASGD_FAST_MM(cvtps_pd)(
        part == 0 ? ASGD_FAST_LOW_FLOATS(values) : ASGD_FAST_HIGH_FLOATS(values));
}

static inline asgd_floats asgd_fast_load_floats(const float *from) {
    asgd_fast_ask(from);
    return *(const asgd_loose_floats *)from;
}

static inline void asgd_fast_store_floats(float *to, asgd_floats values) {
    *(asgd_loose_floats *)to = values;
}

static inline asgd_doubles asgd_fast_load_doubles(const double *from) {
    asgd_fast_ask(from);
    return *(const asgd_loose_doubles *)from;
}

static inline void asgd_fast_store_doubles(double *to, asgd_doubles values) {
    *(asgd_loose_doubles *)to = values;
}

static inline asgd_floats asgd_fast_load_narrowed(const double *from) {
    return ASGD_FAST_JOIN_FLOATS(
        ASGD_FAST_MM(cvtpd_ps)(asgd_fast_load_doubles(from)),
        ASGD_FAST_MM(cvtpd_ps)(asgd_fast_load_doubles(from + ASGD_FAST_DOUBLES)));
}

/* Every other half, and those between. */
static inline asgd_unit asgd_fast_load_bfloat16(const asgd_bfloat16 *from) {
    asgd_fast_ask(from);
    asgd_words bits = *(const asgd_loose_words *)from;
    return (asgd_unit){(asgd_floats)(bits << 16), (asgd_floats)(bits & 0xFFFF0000)};
}

/* As for a number, but that nans need no care: one with digits to round might become another number,
   but those of bfloat16 numbers and of operations have none, and loops.pxi makes scalars so. */
static inline asgd_words asgd_fast_rounded_bfloat16(asgd_floats values) {
    asgd_words bits = (asgd_words)values;
    return bits + 0x7FFF + ((bits >> 16) & 1);
}

static inline asgd_words asgd_fast_pack_bfloat16(asgd_unit values) {
    return (asgd_fast_rounded_bfloat16(values.one) >> 16)
        | (asgd_fast_rounded_bfloat16(values.other) & 0xFFFF0000);
}

static inline void asgd_fast_store_bfloat16(asgd_bfloat16 *to, asgd_unit values) {
    *(asgd_loose_words *)to = asgd_fast_pack_bfloat16(values);
}

/* What the unit becomes when it is stored, in the order of memory. */
static inline asgd_unit asgd_fast_stored_bfloat16(asgd_unit values) {
    asgd_integers bits = (asgd_integers)asgd_fast_pack_bfloat16(values);
    asgd_words low = (asgd_words)ASGD_FAST_MM(cvtepu16_epi32)(ASGD_FAST_LOW(bits));
    asgd_words high = (asgd_words)ASGD_FAST_MM(cvtepu16_epi32)(ASGD_FAST_HIGH(bits));
    return (asgd_unit){(asgd_floats)(low << 16), (asgd_floats)(high << 16)};
}

/* In the order of memory. */
static inline asgd_unit asgd_fast_load_float16(const asgd_float16 *from) {
    asgd_fast_ask(from);
    const asgd_loose_halves *halves = (const asgd_loose_halves *)from;
    return (asgd_unit){ASGD_FAST_MM(cvtph_ps)(halves[0]), ASGD_FAST_MM(cvtph_ps)(halves[1])};
}

static inline asgd_halves asgd_fast_pack_float16(asgd_floats values) {
    return ASGD_FAST_MM(cvtps_ph)(values, _MM_FROUND_TO_NEAREST_INT);
}

static inline void asgd_fast_store_float16(asgd_float16 *to, asgd_unit values) {
    asgd_loose_halves *halves = (asgd_loose_halves *)to;
    halves[0] = asgd_fast_pack_float16(values.one);
    halves[1] = asgd_fast_pack_float16(values.other);
}

static inline asgd_unit asgd_fast_stored_float16(asgd_unit values) {
    return (asgd_unit){
        ASGD_FAST_MM(cvtph_ps)(asgd_fast_pack_float16(values.one)),
        ASGD_FAST_MM(cvtph_ps)(asgd_fast_pack_float16(values.other))};
}

#else

#define ASGD_FAST_FLOATS 1
#define ASGD_FAST_DOUBLES 1
typedef float asgd_floats;
typedef double asgd_doubles;
typedef struct { asgd_floats one, other; } asgd_unit;

static inline float asgd_fast_all(float value) { return value; }
static inline double asgd_fast_all_doubles(double value) { return value; }
static inline float asgd_fast_fma(float x, float y, float z) { return fmaf(x, y, z); }
static inline double asgd_fast_part(float value, int part) { return part == 0 ? value : 0; }
static inline float asgd_fast_load_floats(const float *from) { return *from; }
static inline void asgd_fast_store_floats(float *to, float value) { *to = value; }
static inline double asgd_fast_load_doubles(const double *from) { return *from; }
static inline float asgd_fast_load_narrowed(const double *from) { return (float)*from; }
static inline void asgd_fast_store_doubles(double *to, double value) { *to = value; }

#define ASGD_FAST_UNITS_OF(half)                                                                   \
    static inline asgd_unit asgd_fast_load_##half(const asgd_##half *from) {                       \
        asgd_unit values = {asgd_fast_widen_##half(from[0]), asgd_fast_widen_##half(from[1])};     \
        return values;                                                                             \
    }                                                                                              \
    static inline void asgd_fast_store_##half(asgd_##half *to, asgd_unit values) {                 \
        to[0] = asgd_fast_narrow_##half(values.one);                                               \
        to[1] = asgd_fast_narrow_##half(values.other);                                             \
    }                                                                                              \
    static inline asgd_unit asgd_fast_stored_##half(asgd_unit values) {                            \
        asgd_##half halves[2];                                                                     \
        asgd_fast_store_##half(halves, values);                                                    \
        return asgd_fast_load_##half(halves);                                                      \
    }

ASGD_FAST_UNITS_OF(float16)
ASGD_FAST_UNITS_OF(bfloat16)

#endif

#define ASGD_FAST_UNIT (2 * ASGD_FAST_FLOATS)

#endif
