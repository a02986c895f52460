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

}  // namespace

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

// One value at a time, and a block as the walk on the CPU does.
#define FLOAT_ENTRIES(NAME, FORMAT)                                                                  \
  void store_##NAME(const float* x, const int32_t*, int64_t rows, int64_t columns, uint16_t* values, \
                    void*) {                                                                         \
    for (int64_t i = 0; i < rows * columns; ++i) values[i] = FORMAT::store(x[i]);                    \
  }                                                                                                  \
  void load_##NAME(const uint16_t* values, const void*, int64_t rows, int64_t columns, float* x) {   \
    for (int64_t i = 0; i < rows * columns; ++i) x[i] = FORMAT::load(values[i]);                     \
  }                                                                                                  \
  void store_block_##NAME(uint16_t* values, int64_t n, const float* x) {                             \
    store_block({FORMAT::kCode, reinterpret_cast<uint64_t>(values)}, 0, n, x);                      \
  }                                                                                                  \
  void load_block_##NAME(const uint16_t* values, int64_t n, float* x) {                              \
    float buffer[kBlock];                                                                            \
    const float* loaded =                                                                            \
        load_block<kRead>({FORMAT::kCode, reinterpret_cast<uint64_t>(values)}, 0, n, buffer);       \
    for (int64_t i = 0; i < n; ++i) x[i] = loaded[i];                                                \
  }

extern "C" {
int64_t block() { return kBlock; }
FLOAT_ENTRIES(bfloat16, BFloat16)
FLOAT_ENTRIES(float16, Float16)
ROOT_ENTRIES(root_signed, SignedRoot)
ROOT_ENTRIES(root_unsigned, UnsignedRoot)

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
