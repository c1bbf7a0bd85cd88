/* What compilers do not make of plain loops: the conversions of half types. Everything here moves a
   unit of 16 elements, which at each SIMD level are whole vectors, so that a loop over units keeps
   them in registers; at each level with the same bits. */

#ifndef ASGD_FAST_SIMD_H
#define ASGD_FAST_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#endif

/* AVX2 stands for F16C too, which every processor with AVX2 has; setup.py asks for both. */
#if defined(__AVX512F__)
#define ASGD_FAST_LEVEL 512
#elif defined(__AVX2__)
#define ASGD_FAST_LEVEL 256
#elif defined(__SSE2__) || defined(_M_X64)
#define ASGD_FAST_LEVEL 128
#else
#define ASGD_FAST_LEVEL 0
#endif

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

static inline void asgd_fast_widen_bfloat16(const asgd_bfloat16 *halves, float *values) {
#if ASGD_FAST_LEVEL == 512
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)halves));
    _mm512_storeu_ps(values, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
#elif ASGD_FAST_LEVEL == 256
    for (int i = 0; i < 16; i += 8) {
        __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(halves + i)));
        _mm256_storeu_ps(values + i, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    }
#else
    for (int i = 0; i < 16; i++)
        values[i] = asgd_fast_float((uint32_t)halves[i].bits << 16);
#endif
}

/* Rounds to nearest, ties to even; a nan stays one. AVX-512 has an instruction for it, which takes
   subnormal numbers for 0. */
static inline void asgd_fast_narrow_bfloat16(const float *values, asgd_bfloat16 *halves) {
#if ASGD_FAST_LEVEL == 512
    __m512 value = _mm512_loadu_ps(values);
    __m512i bits = _mm512_castps_si512(value);
    __m512i high = _mm512_srli_epi32(bits, 16);
    __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    __m512i rounded = _mm512_mask_or_epi32(
        _mm512_srli_epi32(sum, 16), nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256((__m256i *)halves, _mm512_cvtepi32_epi16(rounded));
#elif ASGD_FAST_LEVEL == 256
    __m256i rounded[2];
    for (int i = 0; i < 2; i++) {
        __m256 value = _mm256_loadu_ps(values + 8 * i);
        __m256i bits = _mm256_castps_si256(value);
        __m256i high = _mm256_srli_epi32(bits, 16);
        __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        rounded[i] = _mm256_blendv_epi8(
            _mm256_srli_epi32(sum, 16), _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
    }
    /* Packing goes by halves of the registers, so the quarters come out as 0, 2, 1, 3. */
    _mm256_storeu_si256(
        (__m256i *)halves,
        _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded[0], rounded[1]), 0xD8));
#else
    for (int i = 0; i < 16; i++) {
        uint32_t bits = asgd_fast_bits(values[i]), high = bits >> 16;
        int is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
        halves[i].bits = (uint16_t)(is_nan ? high | 0x40 : (bits + 0x7FFF + (high & 1)) >> 16);
    }
#endif
}

/* Moves the exponent's bias from 15 to 127; a subnormal, too small for that, becomes normal. */
static inline void asgd_fast_widen_float16(const asgd_float16 *halves, float *values) {
#if ASGD_FAST_LEVEL == 512
    _mm512_storeu_ps(values, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves)));
#elif ASGD_FAST_LEVEL == 256
    for (int i = 0; i < 16; i += 8)
        _mm256_storeu_ps(
            values + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#else
    for (int i = 0; i < 16; i++) {
        uint32_t magnitude = ((uint32_t)halves[i].bits & 0x7FFF) << 13;
        /* 2**-14 with the subnormal's digits behind it, minus 2**-14 below: exact. */
        uint32_t subnormal = asgd_fast_bits(
            asgd_fast_float((magnitude & 0x007FFFFF) + (113u << 23)) - 6.103515625e-05f);
        uint32_t bits = magnitude < (1u << 23) ? subnormal : magnitude + (112u << 23);
        if (magnitude >= (31u << 23)) /* infinities, nans */
            bits = magnitude + (224u << 23);
        values[i] = asgd_fast_float(bits | ((uint32_t)halves[i].bits & 0x8000) << 16);
    }
#endif
}

/* Rounds to nearest, ties to even; what is too large becomes infinite, and a nan stays one. */
static inline void asgd_fast_narrow_float16(const float *values, asgd_float16 *halves) {
#if ASGD_FAST_LEVEL == 512
    _mm256_storeu_si256(
        (__m256i *)halves, _mm512_cvtps_ph(_mm512_loadu_ps(values), _MM_FROUND_TO_NEAREST_INT));
#elif ASGD_FAST_LEVEL == 256
    for (int i = 0; i < 16; i += 8)
        _mm_storeu_si128(
            (__m128i *)(halves + i),
            _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < 16; i++) {
        uint32_t magnitude = asgd_fast_bits(values[i]) & 0x7FFFFFFF;
        /* The last digit of 0.5 is the last of a float16 subnormal, so the sum rounds to it. */
        uint32_t subnormal = asgd_fast_bits(asgd_fast_float(magnitude) + 0.5f) - (126u << 23);
        uint32_t normal = (magnitude - (112u << 23) + 0x0FFF + ((magnitude >> 13) & 1)) >> 13;
        /* of a nan, its first digits */
        uint32_t special = magnitude > 0x7F800000 ? 0x7E00 | (magnitude >> 13 & 0x3FF) : 0x7C00;
        uint32_t bits = magnitude < (143u << 23) ? normal : special;
        if (magnitude < (113u << 23))
            bits = subnormal;
        halves[i].bits = (uint16_t)(bits | ((asgd_fast_bits(values[i]) >> 16) & 0x8000));
    }
#endif
}

#endif
