// Matrices in the formats of csrc/formats.h, for tests/formats/codecs.py. Rows are cut into blocks.
#include "../../csrc/cpu/blocks.h"
#include "../../csrc/formats.h"
#include "../../csrc/noise.h"

using namespace fused_adamw;

namespace {

template <typename Code>
void store_codes(const float* x, const int32_t* noise, int64_t columns, typename Code::Stored* values,
                 float* side) {
  for (int64_t begin = 0; begin < columns; begin += kCodeBlock) {
    const int64_t end = begin + kCodeBlock < columns ? begin + kCodeBlock : columns;
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t magnitude = Code::magnitude(x[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    const float t = Code::side(largest);
    const float scale = Code::codes_per_root(t);
    for (int64_t i = begin; i < end; ++i) {
      values[i] = noise ? Code::store(x[i], t, scale, noise[i]) : Code::store(x[i], t, scale);
    }
    *side++ = t;
  }
}

template <typename Code>
void load_codes(const typename Code::Stored* values, const float* side, int64_t columns, float* x) {
  for (int64_t i = 0; i < columns; ++i) {
    const float t = side[i / kCodeBlock];
    x[i] = Code::load(values[i], t, Code::root_per_code(t));
  }
}

// As the walk on the CPU does, so many elements at a time.
template <typename Format>
void load_blocks(typename Format::Stored* values, void* side, int64_t rows, int64_t columns, int64_t block,
                 float* x) {
  const Field at{reinterpret_cast<uint64_t>(values), reinterpret_cast<uint64_t>(side)};
  const int64_t per_row = (columns + block - 1) / block;
  for (int64_t i = 0; i < rows * per_row; ++i) {
    const int64_t column = i % per_row * block, begin = i / per_row * columns + column;
    const int64_t n = column + block < columns ? block : columns - column;
    float buffer[kLargestBlock];
    const float* loaded = Codec<Format>::load(Stretch<Format>::of(at, {begin, n, i, nullptr}, 0), buffer);
    for (int64_t k = 0; k < n; ++k) x[begin + k] = loaded[k];
  }
}

template <typename Format>
void store_blocks(const float* x, const uint32_t* noise, int64_t rows, int64_t columns, int64_t block,
                  typename Format::Stored* values, void* side) {
  const Field at{reinterpret_cast<uint64_t>(values), reinterpret_cast<uint64_t>(side)};
  const int64_t per_row = (columns + block - 1) / block;
  for (int64_t i = 0; i < rows * per_row; ++i) {
    const int64_t column = i % per_row * block, begin = i / per_row * columns + column;
    const int64_t n = column + block < columns ? block : columns - column;
    Codec<Format>::store(Stretch<Format>::of(at, {begin, n, i, noise + begin}, 0), x + begin);
  }
}

}  // namespace

#define BLOCK_ENTRIES(NAME, FORMAT)                                                                         \
  void store_blocks_##NAME(const float* x, const uint32_t* noise, int64_t rows, int64_t columns,            \
                           int64_t block, FORMAT::Stored* values, void* side) {                             \
    store_blocks<FORMAT>(x, noise, rows, columns, block, values, side);                                     \
  }                                                                                                         \
  void load_blocks_##NAME(FORMAT::Stored* values, void* side, int64_t rows, int64_t columns, int64_t block, \
                          float* x) {                                                                       \
    load_blocks<FORMAT>(values, side, rows, columns, block, x);                                             \
  }

// One value at a time.
#define ROOT_ENTRIES(NAME, CODE)                                                                             \
  void store_##NAME(const float* x, const int32_t* noise, int64_t rows, int64_t columns,                     \
                    CODE::Stored* values, float* side) {                                                     \
    const int64_t blocks = (columns + kCodeBlock - 1) / kCodeBlock;                                          \
    for (int64_t r = 0; r < rows; ++r) {                                                                     \
      const int64_t at = r * columns;                                                                        \
      store_codes<CODE>(x + at, noise ? noise + at : noise, columns, values + at, side + r * blocks);        \
    }                                                                                                        \
  }                                                                                                          \
  void load_##NAME(const CODE::Stored* values, const float* side, int64_t rows, int64_t columns, float* x) { \
    const int64_t blocks = (columns + kCodeBlock - 1) / kCodeBlock;                                          \
    for (int64_t r = 0; r < rows; ++r) {                                                                     \
      load_codes<CODE>(values + r * columns, side + r * blocks, columns, x + r * columns);                   \
    }                                                                                                        \
  }

#define FLOAT_ENTRIES(NAME, FORMAT)                                                                  \
  void store_##NAME(const float* x, const int32_t*, int64_t rows, int64_t columns, uint16_t* values, \
                    void*) {                                                                         \
    for (int64_t i = 0; i < rows * columns; ++i) values[i] = FORMAT::store(x[i]);                    \
  }                                                                                                  \
  void load_##NAME(const uint16_t* values, const void*, int64_t rows, int64_t columns, float* x) {   \
    for (int64_t i = 0; i < rows * columns; ++i) x[i] = FORMAT::load(values[i]);                     \
  }

extern "C" {
int64_t block() { return kBlock; }
FLOAT_ENTRIES(bfloat16, BFloat16)
FLOAT_ENTRIES(float16, Float16)
ROOT_ENTRIES(root_signed, SignedRoot)
ROOT_ENTRIES(root_unsigned, UnsignedRoot)
BLOCK_ENTRIES(bfloat16, BFloat16)
BLOCK_ENTRIES(float16, Float16)
BLOCK_ENTRIES(bfloat16_stochastic, StochasticBFloat16)
BLOCK_ENTRIES(bfloat16_split, SplitBFloat16)
BLOCK_ENTRIES(root_signed, SignedRoot)
BLOCK_ENTRIES(root_unsigned, UnsignedRoot)

void store_bfloat16_stochastic(const float* x, const int32_t* noise, int64_t rows, int64_t columns,
                               uint16_t* values, void*) {
  for (int64_t i = 0; i < rows * columns; ++i) {
    values[i] = noise ? StochasticBFloat16::store(x[i], noise[i]) : BFloat16::store(x[i]);
  }
}
void load_bfloat16_stochastic(const uint16_t* values, const void*, int64_t rows, int64_t columns, float* x) {
  for (int64_t i = 0; i < rows * columns; ++i) x[i] = StochasticBFloat16::load(values[i]);
}
void store_bfloat16_split(const float* x, const int32_t*, int64_t rows, int64_t columns, uint16_t* values,
                          int16_t* side) {
  for (int64_t i = 0; i < rows * columns; ++i) values[i] = SplitBFloat16::store(x[i], side[i]);
}
void load_bfloat16_split(const uint16_t* values, const int16_t* side, int64_t rows, int64_t columns,
                         float* x) {
  for (int64_t i = 0; i < rows * columns; ++i) x[i] = SplitBFloat16::load(values[i], side[i]);
}

void noise_hash(uint64_t word, uint64_t step, const uint64_t* index, int64_t n, uint32_t* out) {
  const NoiseKey key = noise_key(word, step);
  for (int64_t i = 0; i < n; ++i) out[i] = noise_bits(key, index[i]);
}
}
