// What a step finds out about single elements, for norms by parameter. For host and device.
#pragma once

#include "formats.h"
#include "inline.h"

namespace fused_adamw {

// Whether rounding to bfloat16 would lose an update: it is below half a unit in the last place of p.
ADAMW_FN bool is_lost(float p, float update) {
  const uint32_t exponent = as_bits(p) & 0x7f800000, least = 0x00800000;
  const float half_unit = as_float(exponent > least ? exponent : least) * 0x1p-8f;
  const float size = as_float(as_bits(update) & 0x7fffffff);
  return (size < half_unit) & (size > 0.0f);  // no branch: vectors take none
}

// The larger one; NaN wins.
template <typename T>
ADAMW_FN T larger(T x, T y) {
  return (x > y || x != x) ? x : y;
}

}  // namespace fused_adamw
