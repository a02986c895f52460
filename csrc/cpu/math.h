// Division by a coefficient, which is one for many elements, without dividing: the bits of a division in a
// fraction of its time.
#pragma once

#include <float.h>

#include "../adamw.h"
#include "../formats.h"

namespace fused_adamw {
namespace {

template <typename T>
struct CpuMath : IeeeMath {
  ADAMW_FN CpuMath of(T) { return {}; }
};

// Where there are fused multiply-adds, and what bounds a step is not the conversions.
#if defined(__AVX512F__)
template <>
struct CpuMath<float> : IeeeMath {
  float nearest;      // the reciprocal
  float below, rest;  // it again, in two positive parts

  ADAMW_FN CpuMath of(float divisor) {
    const double reciprocal = 1.0 / static_cast<double>(divisor);
    CpuMath math;
    math.nearest = 1.0f / divisor;
    math.below = as_float(as_bits(math.nearest) - (math.nearest > reciprocal));
    const float rest = static_cast<float>(reciprocal - static_cast<double>(math.below));
    const float least = math.below * 0x1p-40f;
    math.rest = rest > least ? rest : least;
    return math;
  }

  // For roots of floats and divisors in [2^-30, 1], so that nothing is subnormal. `close` is one of the two
  // floats around the quotient; what it leaves of x is exact, and that times the nearest reciprocal corrects
  // it to the nearest quotient (Markstein, 1990). Of an infinity it leaves NaN, which the minimum drops.
  inline __attribute__((always_inline)) float divide_by_coefficient(float x, float divisor) const {
    const float close = __builtin_fmaf(x, below, x * rest);
    const float left = __builtin_fmaf(-divisor, close, x);
    return __builtin_fmaf(left < FLT_MAX ? left : FLT_MAX, nearest, close);
  }
};
#endif

}  // namespace
}  // namespace fused_adamw
