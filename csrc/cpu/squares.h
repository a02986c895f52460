// Sums of squares, in double: no overflow for any float32 gradient, and far below float32's rounding. Each
// lane sums every 32nd square, and the lanes are summed as a tree: the same order for all instruction sets.
#pragma once

#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "blocks.h"

namespace fused_adamw {
namespace {

// As many doubles as a register holds. Sums of a vector type stay in registers; those in an array do not.
typedef double Doubles __attribute__((vector_size(kRegisterBytes)));
constexpr int64_t kWideWidth = kRegisterBytes / sizeof(double);

#if defined(__AVX512F__)
// Unmasked, these warn of uninitialised registers in GCC 12.
ADAMW_FN Doubles widen(__m256 x) { return (Doubles)_mm512_maskz_cvtps_pd(0xff, x); }
#elif defined(__AVX2__)
ADAMW_FN Doubles widen(__m128 x) { return (Doubles)_mm256_cvtps_pd(x); }
#endif

// The next elements of a format.
template <typename Format>
struct Wide {
  ADAMW_FN Doubles load(const typename Format::Stored* x) {
    Doubles wide;
#pragma GCC unroll 8
    for (int64_t lane = 0; lane < kWideWidth; ++lane) wide[lane] = Format::load(x[lane]);
    return wide;
  }
};

#if defined(__AVX512F__)
template <>
struct Wide<Float32> {
  ADAMW_FN Doubles load(const float* x) { return widen(_mm256_loadu_ps(x)); }
};
template <>
struct Wide<BFloat16> {
  ADAMW_FN Doubles load(const uint16_t* x) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return widen(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
  }
};
template <>
struct Wide<Float16> {
  ADAMW_FN Doubles load(const uint16_t* x) {
    return widen(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
  }
};
#elif defined(__AVX2__)
template <>
struct Wide<Float32> {
  ADAMW_FN Doubles load(const float* x) { return widen(_mm_loadu_ps(x)); }
};
template <>
struct Wide<BFloat16> {
  ADAMW_FN Doubles load(const uint16_t* x) {
    const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
    return widen(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
  }
};
template <>
struct Wide<Float16> {
  ADAMW_FN Doubles load(const uint16_t* x) {
    return widen(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
  }
};
#endif

// sum + x * x, where the square of a float is exact: fused or not makes no difference.
template <typename Format>
ADAMW_FN Doubles add_square(Doubles sum, Doubles x) {
#if defined(__AVX512F__)
  if constexpr (Format::kCode != kFloat64)
    return (Doubles)_mm512_fmadd_pd((__m512d)x, (__m512d)x, (__m512d)sum);
#endif
  return sum + x * x;
}

// The squares of some neighbouring elements, which are added a few at a time.
struct Squares {
  static constexpr int64_t kLanes = 32, kRegisters = kLanes / kWideWidth;
  Operand<PlainFormats> g;
  int64_t next, end;  // what is to be added
  Doubles sums[kRegisters];

  // Adds up to n elements, as long as there are whole blocks of them.
  void add(int64_t n) {
    PlainFormats::visit(g.format, [&](auto format) __attribute__((always_inline)) {
      using Format = decltype(format);
      const auto* x = reinterpret_cast<const typename Format::Stored*>(g.at.values) + next;
      const int64_t stop = next + (end - next < n ? end - next : n) / kLanes * kLanes;
      Doubles now[kRegisters];
      memcpy(now, sums, sizeof sums);
      for (; next < stop; next += kLanes, x += kLanes) {
        prefetch_block<kRead, kLanes>(x);
#pragma GCC unroll 16
        for (int64_t k = 0; k < kRegisters; ++k) {
          now[k] = add_square<Format>(now[k], Wide<Format>::load(x + k * kWideWidth));
        }
      }
      memcpy(sums, now, sizeof sums);
    });
  }

  // Adds the rest of a block.
  double total() {
    double lanes[kLanes];
    memcpy(lanes, sums, sizeof lanes);
    PlainFormats::visit(g.format, [&](auto format) __attribute__((always_inline)) {
      using Format = decltype(format);
      const auto* x = reinterpret_cast<const typename Format::Stored*>(g.at.values) + next;
      for (int64_t lane = 0; next + lane < end; ++lane) {
        const double wide = Format::load(x[lane]);
        lanes[lane] += wide * wide;
      }
    });
    for (int64_t width = kLanes / 2; width; width /= 2) {
      for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
  }
};

}  // namespace
}  // namespace fused_adamw
