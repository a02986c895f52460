// By hand, for AVX-512: 32 floats as the upper and the lower halves of their bits, in twice as many lanes as
// the floats take. The same as formats.h, which says what is done and why.
#pragma once

#if defined(__AVX512BW__)

#include <immintrin.h>

#include "../inline.h"

namespace fused_adamw {
namespace {

constexpr int64_t kHalves = 32;

typedef uint16_t Lanes __attribute__((vector_size(64)));
constexpr Lanes kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                         0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
constexpr Lanes kTwice = {0, 0, 1, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
                          8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};

struct Halves {
  __m512i upper, lower;
};

ADAMW_FN __m512i lanes(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
ADAMW_FN __m512i load_lanes(const void* from) { return _mm512_loadu_si512(from); }
ADAMW_FN void store_lanes(void* to, __m512i x) { _mm512_storeu_si512(to, x); }

// Of 32 words the lower halves, or with `which` 1 the upper ones. A permutation of two registers would be
// three instructions in one.
ADAMW_FN __m512i halves_of(__m512i first, __m512i second, int which) {
  const __m512i index = _mm512_add_epi16((__m512i)kEven, lanes(which));
  return _mm512_mask_permutexvar_epi16(_mm512_maskz_permutexvar_epi16(~0u, index, first), 0xffff0000, index,
                                       second);
}

ADAMW_FN __m512i halves_of(const uint32_t* words, int which) {
  return halves_of(load_lanes(words), load_lanes(words + 16), which);
}

ADAMW_FN Halves halves_of(const float* x) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(x);
  return {halves_of(words, 1), halves_of(words, 0)};
}

ADAMW_FN __mmask32 nan_lanes(const float* x) {
  const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  return _mm512_kunpackw(_mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q));
}

ADAMW_FN __m512i increment(__m512i x, __mmask32 where) {
  return _mm512_mask_sub_epi16(x, where, x, lanes(-1));
}

// 16 bits of each of 16 words of noise.
ADAMW_FN __m512i noise_words(const uint32_t* noise, int shift) {
  const __m512i words = load_lanes(noise);
  return shift ? _mm512_maskz_srli_epi32(0xffff, words, 16)
               : _mm512_and_si512(words, _mm512_set1_epi32(0xffff));
}

ADAMW_FN __m512i quiet_nan(__m512i upper) {
  return _mm512_or_si512(_mm512_and_si512(upper, lanes(0x8000)), lanes(0x7fc0));
}

// 16 words whose upper halves these are, the first or the second 16, and whose lower halves are 0.
ADAMW_FN __m512i upper_words(__m512i upper, int second) {
  const __m512i index = _mm512_add_epi16((__m512i)kTwice, lanes(16 * second));
  return _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, index, upper);
}

// BFloat16::load.
ADAMW_FN void load_upper(const uint16_t* values, float* x) {
  const __m512i upper = load_lanes(values);
  store_lanes(x, upper_words(upper, 0));
  store_lanes(x + 16, upper_words(upper, 1));
}

// BFloat16::store.
ADAMW_FN void store_nearest(uint16_t* values, const float* x) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormal numbers for zeros, and keeps what NaN there is.
  constexpr int kSubnormalOrNan = 0x20 | 0x81;
  const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  const __mmask16 rare_a = _mm512_fpclass_ps_mask(a, kSubnormalOrNan);
  const __mmask16 rare_b = _mm512_fpclass_ps_mask(b, kSubnormalOrNan);
  if (__builtin_expect(_kortestz_mask16_u8(rare_a, rare_b), 1)) {
    return store_lanes(values, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
#endif
  const Halves half = halves_of(x);
  const __m512i odd = _mm512_and_si512(half.upper, lanes(1));
  const __mmask32 up = _mm512_cmpgt_epu16_mask(half.lower, _mm512_sub_epi16(lanes(0x8000), odd));
  store_lanes(values, _mm512_mask_mov_epi16(increment(half.upper, up), nan_lanes(x), lanes(0x7fc0)));
}

// StochasticBFloat16::store; `shift`: which 16 bits of the noise.
ADAMW_FN void store_stochastic(uint16_t* values, const float* x, const uint32_t* noise, int shift) {
  const __m512i a = load_lanes(x), b = load_lanes(x + 16);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), least = _mm512_set1_epi32(0x7f7f0000);
  const __mmask16 rare_a = _mm512_cmpge_epu32_mask(_mm512_and_si512(a, magnitude), least);
  const __mmask16 rare_b = _mm512_cmpge_epu32_mask(_mm512_and_si512(b, magnitude), least);
  if (__builtin_expect(_kortestz_mask16_u8(rare_a, rare_b), 1)) {  // none may become infinite, or is already
    const __m512i sum_a = _mm512_add_epi32(a, noise_words(noise, shift));
    const __m512i sum_b = _mm512_add_epi32(b, noise_words(noise + 16, shift));
    return store_lanes(values, halves_of(sum_a, sum_b, 1));
  }
  const Halves half = halves_of(x);
  const __m512i drawn = halves_of(noise, shift / 16);
  const __mmask32 carry = _mm512_cmplt_epu16_mask(_mm512_add_epi16(half.lower, drawn), half.lower);
  const __mmask32 up =
      _mm512_mask_cmplt_epu16_mask(carry, _mm512_and_si512(half.upper, lanes(0x7fff)), lanes(0x7f7f));
  const __m512i rounded = increment(half.upper, up);
  store_lanes(values, _mm512_mask_mov_epi16(rounded, nan_lanes(x), quiet_nan(half.upper)));
}

// SplitBFloat16::store.
ADAMW_FN void store_split(uint16_t* values, int16_t* residuals, const float* x) {
  Halves half = halves_of(x);
  if (const __mmask32 nan = nan_lanes(x); __builtin_expect(nan != 0, 0)) {
    half.upper = _mm512_mask_mov_epi16(half.upper, nan, quiet_nan(half.upper));
    half.lower = _mm512_maskz_mov_epi16(~nan, half.lower);
  }
  store_lanes(values, increment(half.upper, _mm512_movepi16_mask(half.lower)));
  store_lanes(residuals, half.lower);
}

// SplitBFloat16::load.
ADAMW_FN void load_split(const uint16_t* values, const int16_t* residuals, float* x) {
  const __m512i upper = load_lanes(values);
  __m512i lower = load_lanes(residuals);
  const __m512i magnitude = _mm512_and_si512(upper, lanes(0x7fff));
  // Neither zero nor infinity nor NaN: no residual is stale.
  if (_mm512_cmpge_epu16_mask(_mm512_sub_epi16(magnitude, lanes(1)), lanes(0x7f7f))) {
    const __mmask32 negative = _mm512_movepi16_mask(lower);
    const __mmask32 stale = _mm512_cmpgt_epu16_mask(magnitude, lanes(0x7f80)) |
                            _mm512_mask_cmpeq_epu16_mask(negative, magnitude, lanes(0)) |
                            _mm512_mask_cmpeq_epu16_mask(~negative, magnitude, lanes(0x7f80));
    lower = _mm512_maskz_mov_epi16(~stale, lower);
  }
  const __m512i first = _mm512_maskz_cvtepi16_epi32(0xffff, _mm512_maskz_extracti64x4_epi64(0xf, lower, 0));
  const __m512i second = _mm512_maskz_cvtepi16_epi32(0xffff, _mm512_maskz_extracti64x4_epi64(0xf, lower, 1));
  store_lanes(x, _mm512_add_epi32(upper_words(upper, 0), first));
  store_lanes(x + 16, _mm512_add_epi32(upper_words(upper, 1), second));
}

}  // namespace
}  // namespace fused_adamw

#endif
