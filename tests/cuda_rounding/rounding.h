// What is asked of FastMath, on a GPU and in the emulation: the bits of IEEE 754, or `exact` is false.
#pragma once

#include "../../csrc/adamw.h"
#include "../../csrc/cuda/fast_math.h"

struct Counts {
  unsigned long long wrong, repeated, all;  // repeated: left to the slow path
};

__device__ inline void check(bool exact, float fast, float right, Counts* counts) {
  using fused_adamw::as_bits;
  const bool equal = as_bits(fast) == as_bits(right) || (fast != fast && right != right);
  counts->wrong += exact && !equal;
  counts->repeated += !exact;
  ++counts->all;
}

__device__ inline void check_root(float x, Counts* counts) {
  fused_adamw::FastMath fast;
  const float root = fast.square_root(x);
  check(fast.exact, root, fused_adamw::IeeeMath::square_root(x), counts);
}

__device__ inline void check_quotient(float x, float y, Counts* counts) {
  fused_adamw::FastMath fast;
  const float quotient = fast.divide(x, y);
  check(fast.exact, quotient, fused_adamw::IeeeMath::divide(x, y), counts);
}

// A number with this mantissa (23 bits) and exponent.
__device__ inline float number(uint32_t mantissa, int exponent) {
  return fused_adamw::as_float(mantissa | static_cast<uint32_t>(exponent + 127) << 23);
}
