// Blocks of elements between memory and the buffers of the CPU walk: formats.h in a loop, and by hand what
// compilers vectorise badly from that, or not at all. Compiled once per instruction set, like the walk.
#pragma once

#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "../formats.h"
#include "../noise.h"
#include "halves.h"

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
// block's. Where there is noise to draw meanwhile, twice as many are better. Where values share a side, their
// blocks are those of the walk.
constexpr int64_t kBlock = 32;
constexpr int64_t kNoiseBlock = 64;
constexpr int64_t kLargestBlock = kCodeBlock;

// One tensor of a row: how it is kept, in one of these formats, and where.
template <typename List>
struct Operand {
  FormatCode format;
  Field at;
};

// Where the elements of a row draw their noise from: its key, and where they lie in the whole tensor.
struct RowNoise {
  NoiseKey key;
  int64_t offset, local_columns, columns;
  bool high;  // whether only the high 16 bits are for any tensor
};

// Elements that are neighbours in the whole tensor too, and are hashed together.
struct Neighbours {
  NoiseRun run;
  int64_t n;

  ADAMW_FN Neighbours from(const RowNoise& row, int64_t begin) {
    uint64_t place = row.offset + begin;
    int64_t n = NoiseRun::length(place);
    if (row.local_columns != row.columns) {
      const int64_t column = begin % row.local_columns, left = row.local_columns - column;
      place = row.offset + begin / row.local_columns * row.columns + column;
      n = NoiseRun::length(place);
      n = left < n ? left : n;
    }
    return {NoiseRun::from(row.key, place), n};
  }
  ADAMW_FN void draw(const NoiseRun& run, bool high, uint32_t n, uint32_t* hash) {
    if (high) {
      for (uint32_t i = 0; i < n; ++i) hash[i] = NoiseRun::high_bits(run, i);
    } else {
      for (uint32_t i = 0; i < n; ++i) hash[i] = NoiseRun::bits(run, i);
    }
  }
};

// 32 bits for each of n elements from `begin` on.
ADAMW_FN void draw(const RowNoise& row, int64_t begin, int64_t n, uint32_t* hash) {
  Neighbours some = Neighbours::from(row, begin);
  if (some.n >= n) return Neighbours::draw(some.run, row.high, n, hash);  // mostly, and n is a constant
  while (n > 0) {
    const int64_t k = some.n < n ? some.n : n;
    Neighbours::draw(some.run, row.high, k, hash);
    begin += k;
    hash += k;
    n -= k;
    some = Neighbours::from(row, begin);
  }
}

// What is stepped at once: neighbouring elements of a row.
struct Block {
  int64_t begin, n;
  int64_t side;           // the number of the side that they share, if they do
  const uint32_t* noise;  // 32 bits for each of them, if any format takes noise
};

// A block of a tensor in a format.
template <typename Format>
struct Stretch {
  using Stored = typename Format::Stored;
  using Side = typename Format::Side;
  Stored* values;
  Side* side;
  int64_t n;
  const uint32_t* noise;
  int noise_shift;  // which 16 bits of it are this tensor's

  ADAMW_FN Stretch of(const Field& at, const Block& block, int noise_shift) {
    Stretch x{reinterpret_cast<Stored*>(at.values) + block.begin, reinterpret_cast<Side*>(at.side), block.n,
              block.noise, noise_shift};
    if constexpr (Format::kSide == kSidePerValue) x.side += block.begin;
    if constexpr (Format::kSide == kSidePerBlock) x.side += block.side;
    return x;
  }
  uint32_t noise_of(int64_t i) const { return noise[i] >> noise_shift & 0xffff; }
};

// A format's elements in and out of `buffer`.
template <typename Format>
struct Codec {
  using T = typename Format::Register;
  ADAMW_FN T* load(Stretch<Format> x, T* buffer) {
    for (int64_t i = 0; i < x.n; ++i) buffer[i] = Format::load(x.values[i]);
    return buffer;
  }
  ADAMW_FN void store(Stretch<Format> x, const T* buffer) {
    for (int64_t i = 0; i < x.n; ++i) x.values[i] = Format::store(buffer[i]);
  }
};

// What is in memory as in a register stays in place.
template <typename Format>
struct InPlace {
  using T = typename Format::Register;
  ADAMW_FN T* load(Stretch<Format> x, T*) { return x.values; }
  ADAMW_FN void store(Stretch<Format>, const T*) {}
};
template <>
struct Codec<Float32> : InPlace<Float32> {};
template <>
struct Codec<Float64> : InPlace<Float64> {};

template <>
struct Codec<BFloat16> {
  static constexpr int64_t kWidth = kRegisterBytes / sizeof(uint32_t);
  typedef uint32_t Words __attribute__((vector_size(kRegisterBytes)));

  ADAMW_FN float* load(Stretch<BFloat16> x, float* buffer) {
    const uint16_t* const values = x.values;
    const int64_t n = x.n;
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; i + kHalves <= n; i += kHalves) load_upper(values + i, buffer + i);
#endif
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

  ADAMW_FN void store(Stretch<BFloat16> x, const float* buffer) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; i + kHalves <= x.n; i += kHalves) store_nearest(x.values + i, buffer + i);
#endif
    uint32_t rounded[kLargestBlock];  // two loops: the second packs whole registers
    for (int64_t k = i; k < x.n; ++k) rounded[k] = BFloat16::round(buffer[k]) >> 16;
    for (; i < x.n; ++i) x.values[i] = static_cast<uint16_t>(rounded[i]);
  }
};

#ifdef __F16C__
template <>
struct Codec<Float16> {
  static constexpr int64_t kWidth = kRegisterBytes / sizeof(float);
  ADAMW_FN float* load(Stretch<Float16> x, float* buffer) {
    const uint16_t* const values = x.values;
    const int64_t n = x.n;
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
  ADAMW_FN void store(Stretch<Float16> x, const float* buffer) {
    uint16_t* const values = x.values;
    const int64_t n = x.n;
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

template <>
struct Codec<StochasticBFloat16> {
  ADAMW_FN float* load(Stretch<StochasticBFloat16> x, float* buffer) {
    return Codec<BFloat16>::load({x.values, nullptr, x.n, nullptr, 0}, buffer);
  }
  ADAMW_FN void store(Stretch<StochasticBFloat16> x, const float* buffer) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; i + kHalves <= x.n; i += kHalves) {
      store_stochastic(x.values + i, buffer + i, x.noise + i, x.noise_shift);
    }
#endif
    for (; i < x.n; ++i) x.values[i] = StochasticBFloat16::store(buffer[i], x.noise_of(i));
  }
};

template <>
struct Codec<SplitBFloat16> {
  ADAMW_FN float* load(Stretch<SplitBFloat16> x, float* buffer) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; i + kHalves <= x.n; i += kHalves) load_split(x.values + i, x.side + i, buffer + i);
#endif
    for (; i < x.n; ++i) buffer[i] = SplitBFloat16::load(x.values[i], x.side[i]);
    return buffer;
  }
  ADAMW_FN void store(Stretch<SplitBFloat16> x, const float* buffer) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; i + kHalves <= x.n; i += kHalves) store_split(x.values + i, x.side + i, buffer + i);
#endif
    for (; i < x.n; ++i) x.values[i] = SplitBFloat16::store(buffer[i], x.side[i]);
  }
};

// Stored in two sweeps: the largest magnitude first, which the codes depend on.
template <typename Code>
struct RootCodec {
  ADAMW_FN float* load(Stretch<Code> x, float* buffer) {
    const float side = *x.side, root_per_code = Code::root_per_code(side);
#pragma GCC ivdep
    for (int64_t i = 0; i < x.n; ++i) buffer[i] = Code::load(x.values[i], side, root_per_code);
    return buffer;
  }
  ADAMW_FN void store(Stretch<Code> x, const float* buffer) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < x.n; ++i) {
      const uint32_t magnitude = Code::magnitude(buffer[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    const float side = Code::side(largest), codes_per_root = Code::codes_per_root(side);
    *x.side = side;
#pragma GCC ivdep
    for (int64_t i = 0; i < x.n; ++i) {
      x.values[i] = Code::store(buffer[i], side, codes_per_root, x.noise_of(i));
    }
  }
};
template <>
struct Codec<SignedRoot> : RootCodec<SignedRoot> {};
template <>
struct Codec<UnsignedRoot> : RootCodec<UnsignedRoot> {};

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// Of a walk: the type of its arithmetic, how many elements it steps at once, whether it draws noise.
template <typename T_, int64_t kSize_, bool kNoise_>
struct Walk {
  using T = T_;
  static constexpr int64_t kSize = kSize_;
  static constexpr bool kNoise = kNoise_;

  // Whether it is taken for tensors in a format: loops for the others would only take up registers.
  template <typename Format>
  static constexpr bool kTakes = kSame<typename Format::Register, T> && (kNoise || !Format::kTakesNoise) &&
                                 (kSize == kCodeBlock || Format::kSide != kSidePerBlock);
};

// Calls f with the operand's format.
template <typename Walk, typename List, typename F>
ADAMW_FN void visit(const Operand<List>& x, const F& f) {
  List::visit(x.format, [&](auto format) __attribute__((always_inline)) {
    if constexpr (Walk::template kTakes<decltype(format)>) f(format);
  });
}

// How far ahead of the loop memory is asked for. The hardware prefetcher follows fewer streams than an update
// has.
constexpr int64_t kPrefetchBytes = 1024;

enum Access { kRead = 0, kWrite = 1 };

template <Access kAccess, int64_t kSize, typename Element>
ADAMW_FN void prefetch_block(const Element* elements) {
  const char* at = reinterpret_cast<const char*>(elements) + kPrefetchBytes;
  for (int64_t line = 0; line < kSize * static_cast<int64_t>(sizeof(Element)); line += 64) {
    __builtin_prefetch(at + line, kAccess, 3);
  }
}

// The block's elements as the arithmetic has them: in `buffer`, or where they are. kAccess says what will be
// done to them.
template <Access kAccess, typename Walk, typename List>
ADAMW_FN auto load_block(const Operand<List>& x, const Block& block, typename Walk::T* buffer) {
  typename Walk::T* loaded = buffer;
  visit<Walk>(x, [&](auto format) __attribute__((always_inline)) {
    using Format = decltype(format);
    const auto stretch = Stretch<Format>::of(x.at, block, 0);
    if (block.n == Walk::kSize) {
      prefetch_block<kAccess, Walk::kSize>(stretch.values);
      if constexpr (Format::kSide == kSidePerValue) prefetch_block<kAccess, Walk::kSize>(stretch.side);
    }
    loaded = Codec<Format>::load(stretch, buffer);
  });
  return loaded;
}

// Back into memory what load_block took out.
template <typename Walk, typename List>
ADAMW_FN void store_block(const Operand<List>& x, const Block& block, const typename Walk::T* loaded,
                          int noise_shift = 0) {
  visit<Walk>(x, [&](auto format) __attribute__((always_inline)) {
    Codec<decltype(format)>::store(Stretch<decltype(format)>::of(x.at, block, noise_shift), loaded);
  });
}

}  // namespace
}  // namespace fused_adamw
