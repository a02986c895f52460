// The noise of stochastic rounding, for host and device: a hash of seed, parameter, step and element, so that
// every walk, replica and shard draws the same bits, without a generator or its state.
#pragma once

#include <stdint.h>

#include "inline.h"

namespace fused_adamw {

ADAMW_FN uint64_t splitmix64(uint64_t x) {
  uint64_t z = x + 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// What lowbias32 does between its first and its last step, and after the first.
ADAMW_FN uint32_t lowbias32_products(uint32_t x) {
  x *= 0x7feb352du;
  return (x ^ x >> 15) * 0x846ca68bu;
}
ADAMW_FN uint32_t lowbias32_rest(uint32_t x) {
  x = lowbias32_products(x);
  return x ^ x >> 16;
}

ADAMW_FN uint32_t lowbias32(uint32_t x) { return lowbias32_rest(x ^ x >> 16); }

// What one step's noise for one parameter begins with.
struct NoiseKey {
  uint32_t low, high;
};

// What a parameter's noise depends on besides step and element; `ordinal`: its number among all parameters.
ADAMW_FN uint64_t noise_word(uint64_t seed, int64_t ordinal) {
  return seed ^ 0x9e3779b97f4a7c15u * static_cast<uint64_t>(ordinal);
}

// `word` is from noise_word; `step` counts this update, 1 for the first.
ADAMW_FN NoiseKey noise_key(uint64_t word, uint64_t step) {
  const uint64_t key = splitmix64(splitmix64(word) + step);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// 32 bits for the element at this place, in memory order, of the whole tensor. The low 16 are for the
// parameter and exp_avg, in which the update is linear, the high 16 for exp_avg_sq.
ADAMW_FN uint32_t noise_bits(NoiseKey key, uint64_t index) {
  const uint32_t low = static_cast<uint32_t>(index), high = static_cast<uint32_t>(index >> 32);
  return lowbias32(lowbias32(low ^ key.low) + key.high + high * 0x9e3779b9u);
}

// The same for places from `index` on that differ in their low 16 bits only: in 32-bit arithmetic, without
// what they share.
struct NoiseRun {
  uint32_t low, key, inner;

  ADAMW_FN NoiseRun from(NoiseKey key, uint64_t index) {
    const uint32_t low = static_cast<uint32_t>(index), high = static_cast<uint32_t>(index >> 32);
    return {low, key.low ^ (low ^ key.low) >> 16, key.high + high * 0x9e3779b9u};
  }
  ADAMW_FN int64_t length(uint64_t index) { return 0x10000 - static_cast<int64_t>(index & 0xffff); }
  ADAMW_FN uint32_t bits(const NoiseRun& run, uint32_t i) {
    return lowbias32(lowbias32_rest((run.low + i) ^ run.key) + run.inner);
  }
  // The same in the high 16 bits, which the last step of lowbias32 leaves as they are.
  ADAMW_FN uint32_t high_bits(const NoiseRun& run, uint32_t i) {
    const uint32_t x = lowbias32_rest((run.low + i) ^ run.key) + run.inner;
    return lowbias32_products(x ^ x >> 16);
  }
};

}  // namespace fused_adamw
