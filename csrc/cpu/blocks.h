// Blocks of elements between memory and the buffers of the CPU walk: formats.h in a loop, and by hand what
// compilers vectorise badly from that, or not at all. Compiled once per instruction set, like the walk.
#pragma once

#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "../formats.h"

namespace fused_adamw {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif

// Elements per block: a few vectors, and whole cache lines of every format. The stores of a block wait for
// its divisions; with more of them waiting, the processor does not get far enough ahead to start the next
// block's.
constexpr int64_t kBlock = 32;

// One tensor of a row: how it is kept, and where.
struct Operand {
  FormatCode format;
  Field at;
};

// A format's elements in and out of `buffer`.
template <typename Format>
struct Codec {
  using Stored = typename Format::Stored;
  using T = typename Format::Register;
  ADAMW_FN T* load(Stored* values, T* buffer, int64_t n) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = Format::load(values[i]);
    return buffer;
  }
  ADAMW_FN void store(Stored* values, const T* buffer, int64_t n) {
    for (int64_t i = 0; i < n; ++i) values[i] = Format::store(buffer[i]);
  }
};

// What is in memory as in a register stays in place.
template <typename T>
struct InPlace {
  ADAMW_FN T* load(T* values, T*, int64_t) { return values; }
  ADAMW_FN void store(T*, const T*, int64_t) {}
};
template <>
struct Codec<Float32> : InPlace<float> {};
template <>
struct Codec<Float64> : InPlace<double> {};

template <>
struct Codec<BFloat16> {
  static constexpr int64_t kWidth = kRegisterBytes / sizeof(uint32_t);
  typedef uint32_t Words __attribute__((vector_size(kRegisterBytes)));

  ADAMW_FN float* load(uint16_t* values, float* buffer, int64_t n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      Words bits;
#pragma GCC unroll 16
      for (int64_t k = 0; k < kWidth; ++k) bits[k] = values[i + k];
      bits <<= 16;
      memcpy(buffer + i, &bits, sizeof bits);
    }
    for (; i < n; ++i) buffer[i] = BFloat16::load(values[i]);
    return buffer;
  }

  ADAMW_FN void store(uint16_t* values, const float* buffer, int64_t n) {
    uint32_t rounded[kBlock];  // two loops: the second packs whole registers
    for (int64_t i = 0; i < n; ++i) rounded[i] = BFloat16::round(buffer[i]) >> 16;
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + kWidth <= n; i += kWidth) {
      const __m256i packed = _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_loadu_si512(rounded + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + i), packed);
    }
#endif
    for (; i < n; ++i) values[i] = static_cast<uint16_t>(rounded[i]);
  }
};

#ifdef __F16C__
template <>
struct Codec<Float16> {
  static constexpr int64_t kWidth = kRegisterBytes / sizeof(float);
  ADAMW_FN float* load(uint16_t* values, float* buffer, int64_t n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
#ifdef __AVX512F__
      // Unmasked, these warn of uninitialised registers in GCC 12.
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
      _mm512_storeu_ps(buffer + i, _mm512_maskz_cvtph_ps(0xffff, half));
#else
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i));
      _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(half));
#endif
    }
    for (; i < n; ++i) buffer[i] = Float16::load(values[i]);
    return buffer;
  }
  ADAMW_FN void store(uint16_t* values, const float* buffer, int64_t n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
#ifdef __AVX512F__
      const __m256i half =
          _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(buffer + i), _MM_FROUND_TO_NEAREST_INT);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + i), half);
#else
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(buffer + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values + i), half);
#endif
    }
    for (; i < n; ++i) values[i] = Float16::store(buffer[i]);
  }
};
#endif

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// Calls f with the operand's format and its values; nothing where its arithmetic is not T.
template <typename T, typename F>
ADAMW_FN void visit(const Operand& x, const F& f) {
  PlainFormats::visit(x.format, [&](auto format) __attribute__((always_inline)) {
    using Format = decltype(format);
    if constexpr (kSame<typename Format::Register, T>) {
      f(format, reinterpret_cast<typename Format::Stored*>(x.at.values));
    }
  });
}

// How far ahead of the loop memory is asked for. The hardware prefetcher follows fewer streams than an update
// has.
constexpr int64_t kPrefetchBytes = 1024;

enum Access { kRead = 0, kWrite = 1 };

template <Access kAccess, typename Stored>
ADAMW_FN void prefetch_block(const Stored* values) {
  const char* at = reinterpret_cast<const char*>(values) + kPrefetchBytes;
  for (int64_t line = 0; line < kBlock * static_cast<int64_t>(sizeof(Stored)); line += 64) {
    __builtin_prefetch(at + line, kAccess, 3);
  }
}

// The n elements from `i` on as the arithmetic has them: in `buffer`, or where they are. kAccess says what
// will be done to them.
template <Access kAccess, typename T>
ADAMW_FN T* load_block(const Operand& x, int64_t i, int64_t n, T* buffer) {
  T* loaded = buffer;
  visit<T>(x, [&](auto format, auto* values) __attribute__((always_inline)) {
    if (n == kBlock) prefetch_block<kAccess>(values + i);
    loaded = Codec<decltype(format)>::load(values + i, buffer, n);
  });
  return loaded;
}

// Back into memory what load_block took out.
template <typename T>
ADAMW_FN void store_block(const Operand& x, int64_t i, int64_t n, const T* loaded) {
  visit<T>(x, [&](auto format, auto* values)
                  __attribute__((always_inline)) { Codec<decltype(format)>::store(values + i, loaded, n); });
}

}  // namespace
}  // namespace fused_adamw
