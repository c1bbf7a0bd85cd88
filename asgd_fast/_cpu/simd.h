/* What compilers do not make of plain loops: half types in vector registers. Every level has the same
   functions, with the same bits. A unit of halves is one vector, as large as the level has them, and
   becomes two vectors of floats; which half stands where is the half type's own affair, as long as the
   elements of one type go together. Where the level has no vectors, a vector is one number. */

#ifndef ASGD_FAST_SIMD_H
#define ASGD_FAST_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Vectors are the compiler's own, whose loads, stores, + and * are those of numbers: nothing is copied
   by memcpy, which moves 16 bytes at a time, and no array stands between a load and a store. AVX2
   stands for F16C too, which every processor with AVX2 has; setup.py asks for both. */
#if defined(__GNUC__) && (defined(__AVX512F__) || defined(__AVX2__))
#include <immintrin.h>
#if defined(__AVX512F__)
#define ASGD_FAST_VECTOR 64
#else
#define ASGD_FAST_VECTOR 32
#endif
typedef float asgd_floats __attribute__((vector_size(ASGD_FAST_VECTOR)));
typedef double asgd_doubles __attribute__((vector_size(ASGD_FAST_VECTOR)));
typedef uint32_t asgd_words __attribute__((vector_size(ASGD_FAST_VECTOR)));
/* The same at any address of their elements. */
typedef asgd_words asgd_loose_words __attribute__((aligned(2), may_alias));
typedef asgd_floats asgd_loose_floats __attribute__((aligned(4), may_alias));
typedef asgd_doubles asgd_loose_doubles __attribute__((aligned(8), may_alias));
#define ASGD_FAST_FLOATS (ASGD_FAST_VECTOR / 4)
#define ASGD_FAST_DOUBLES (ASGD_FAST_VECTOR / 8)
#else
#define ASGD_FAST_VECTOR 4
typedef float asgd_floats;
typedef double asgd_doubles;
typedef uint32_t asgd_words;
typedef float asgd_loose_floats;
typedef double asgd_loose_doubles;
#define ASGD_FAST_FLOATS 1
#define ASGD_FAST_DOUBLES 1
#endif
#define ASGD_FAST_UNIT (ASGD_FAST_VECTOR / 2)
typedef struct { asgd_floats one, other; } asgd_unit;

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

/* Numbers, one at a time. */

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

/* Units. */

/* Asks the memory for what comes 2 KiB later: a core has not room for so many halves on their way as
   would keep its memory busy. One thread gained a tenth (Zen 3, 10 million bfloat16). */
static inline void asgd_fast_ask(const void *address) {
#if ASGD_FAST_VECTOR > 4
    __builtin_prefetch((const void *)((uintptr_t)address + 2048));
#else
    (void)address;
#endif
}

static inline asgd_floats asgd_fast_all(float value) {
#if ASGD_FAST_VECTOR > 4
    return value - (asgd_floats){0};
#else
    return value;
#endif
}

static inline asgd_doubles asgd_fast_all_doubles(double value) {
#if ASGD_FAST_VECTOR > 4
    return value - (asgd_doubles){0};
#else
    return value;
#endif
}

static inline asgd_words asgd_fast_load(const void *halves) {
    asgd_fast_ask(halves);
#if ASGD_FAST_VECTOR > 4
    return *(const asgd_loose_words *)halves;
#else
    asgd_words unit;
    memcpy(&unit, halves, sizeof(unit));
    return unit;
#endif
}

static inline void asgd_fast_store(void *halves, asgd_words unit) {
#if ASGD_FAST_VECTOR > 4
    *(asgd_loose_words *)halves = unit;
#else
    memcpy(halves, &unit, sizeof(unit));
#endif
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

static inline asgd_floats asgd_fast_floats(asgd_words bits) {
#if ASGD_FAST_VECTOR > 4
    return (asgd_floats)bits;
#else
    return asgd_fast_float(bits);
#endif
}

static inline asgd_words asgd_fast_words(asgd_floats values) {
#if ASGD_FAST_VECTOR > 4
    return (asgd_words)values;
#else
    return asgd_fast_bits(values);
#endif
}

/* Every other half, and those between: no element crosses its vector. */
static inline asgd_unit asgd_fast_unit_of_bfloat16(asgd_words unit) {
    asgd_unit values = {asgd_fast_floats(unit << 16), asgd_fast_floats(unit & 0xFFFF0000u)};
    return values;
}

/* As of a number, but that nans need no care: those that come of bfloat16 numbers and of scalars have
   no digits to round, and are quiet. */
static inline asgd_words asgd_fast_round_bfloat16(asgd_floats values) {
    asgd_words bits = asgd_fast_words(values);
    return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

static inline asgd_words asgd_fast_bfloat16_of_unit(asgd_unit values) {
    return asgd_fast_round_bfloat16(values.one) >> 16
        | (asgd_fast_round_bfloat16(values.other) & 0xFFFF0000u);
}

#if ASGD_FAST_VECTOR == 64

static inline asgd_floats asgd_fast_fma(asgd_floats x, asgd_floats y, asgd_floats z) {
    return _mm512_fmadd_ps(x, y, z);
}

static inline asgd_doubles asgd_fast_part(asgd_floats values, int part) {
    return _mm512_cvtps_pd(
        part == 0 ? _mm512_castps512_ps256(values) : _mm512_extractf32x8_ps(values, 1));
}

static inline asgd_unit asgd_fast_unit_of_float16(asgd_words unit) {
    __m512i halves = (__m512i)unit;
    asgd_unit values = {
        _mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
        _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
    return values;
}

static inline asgd_words asgd_fast_float16_of_unit(asgd_unit values) {
    __m256i one = _mm512_cvtps_ph(values.one, _MM_FROUND_TO_NEAREST_INT);
    __m256i other = _mm512_cvtps_ph(values.other, _MM_FROUND_TO_NEAREST_INT);
    return (asgd_words)_mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1);
}

static inline asgd_unit asgd_fast_bfloat16_in_order(asgd_words unit) {
    __m512i halves = (__m512i)unit;
    asgd_unit values = {
        asgd_fast_floats(
            (asgd_words)_mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves)) << 16),
        asgd_fast_floats(
            (asgd_words)_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1)) << 16)};
    return values;
}

#elif ASGD_FAST_VECTOR == 32

static inline asgd_floats asgd_fast_fma(asgd_floats x, asgd_floats y, asgd_floats z) {
    return _mm256_fmadd_ps(x, y, z);
}

static inline asgd_doubles asgd_fast_part(asgd_floats values, int part) {
    return _mm256_cvtps_pd(
        part == 0 ? _mm256_castps256_ps128(values) : _mm256_extractf128_ps(values, 1));
}

static inline asgd_unit asgd_fast_unit_of_float16(asgd_words unit) {
    __m256i halves = (__m256i)unit;
    asgd_unit values = {
        _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
        _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
    return values;
}

static inline asgd_words asgd_fast_float16_of_unit(asgd_unit values) {
    __m128i one = _mm256_cvtps_ph(values.one, _MM_FROUND_TO_NEAREST_INT);
    __m128i other = _mm256_cvtps_ph(values.other, _MM_FROUND_TO_NEAREST_INT);
    return (asgd_words)_mm256_inserti128_si256(_mm256_castsi128_si256(one), other, 1);
}

static inline asgd_unit asgd_fast_bfloat16_in_order(asgd_words unit) {
    __m256i halves = (__m256i)unit;
    asgd_unit values = {
        asgd_fast_floats(
            (asgd_words)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(halves)) << 16),
        asgd_fast_floats(
            (asgd_words)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(halves, 1)) << 16)};
    return values;
}

#else

static inline asgd_floats asgd_fast_fma(asgd_floats x, asgd_floats y, asgd_floats z) {
    return fmaf(x, y, z);
}

static inline asgd_doubles asgd_fast_part(asgd_floats values, int part) {
    (void)part;
    return values;
}

static inline asgd_unit asgd_fast_unit_of_float16(asgd_words unit) {
    asgd_float16 halves[2];
    memcpy(halves, &unit, sizeof(unit));
    asgd_unit values = {asgd_fast_widen_float16(halves[0]), asgd_fast_widen_float16(halves[1])};
    return values;
}

static inline asgd_words asgd_fast_float16_of_unit(asgd_unit values) {
    asgd_float16 halves[2] = {
        asgd_fast_narrow_float16(values.one), asgd_fast_narrow_float16(values.other)};
    asgd_words unit;
    memcpy(&unit, halves, sizeof(unit));
    return unit;
}

static inline asgd_unit asgd_fast_bfloat16_in_order(asgd_words unit) {
    asgd_bfloat16 halves[2];
    memcpy(halves, &unit, sizeof(unit));
    asgd_unit values = {asgd_fast_widen_bfloat16(halves[0]), asgd_fast_widen_bfloat16(halves[1])};
    return values;
}

#endif

#endif
