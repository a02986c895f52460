// Divisions and roots without a branch for each, correctly rounded where their operands allow it.
//
// The compiler's own take a fast sequence of instructions or, for rare operands, a slow one. The branch
// between them keeps the elements of a vector from overlapping. FastMath always takes the fast sequence and
// notes in `exact` whether all operands so far were fit for it; if not, the caller repeats its vector with
// IeeeMath.
#pragma once

#include <cuda_runtime.h>

#include "../formats.h"

namespace fused_adamw {
namespace {

// Good to a few units in the last place, whichever these are on a GPU. The emulation has its own.
#if defined(__CUDACC__)
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float approximate_reciprocal_root(float x) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
#endif

// What is proven for approximations that are off by up to 2 (reciprocals) or 3 (roots) units, by trying all
// mantissas on the CPU (tests/test_fast_math.py): `reciprocal` and `square_root` are correctly rounded. With
// such a reciprocal, one correction of a quotient that is at most a unit off rounds it correctly (Markstein).
struct FastMath {
  bool exact = true;

  // Exact for y in [2^-64, 2^24] and x zero or in [2^-100, 2^50]: the quotient is a normal number, and so are
  // the residuals, which a fused multiply-add has exactly.
  __device__ __forceinline__ float divide(float x, float y) {
    exact &= within<-64, 24>(as_bits(y)) & ((x == 0.0f) | within<-100, 50>(as_bits(x) & 0x7fffffff));
    exact &= ((as_bits(y) + 1) & 0x7fffff) != 0;  // the one mantissa whose reciprocal may be off: all ones
    const float r = reciprocal(y), q = __fmul_rn(x, r);
    return x == 0.0f ? x : __fmaf_rn(__fmaf_rn(-y, q, x), r, q);  // the residual of -0 is +0
  }

  __device__ __forceinline__ float divide_by_coefficient(float x, float y) { return divide(x, y); }

  // Exact for zero and for x in [2^-100, 2^100].
  __device__ __forceinline__ float square_root(float x) {
    exact &= (x == 0.0f) | within<-100, 100>(as_bits(x));
    const float r = approximate_reciprocal_root(x);
    float root = __fmul_rn(x, r), half = __fmul_rn(r, 0.5f);
    const float error = __fmaf_rn(-root, half, 0.5f);
    root = __fmaf_rn(root, error, root);
    half = __fmaf_rn(half, error, half);
    return x == 0.0f ? x : __fmaf_rn(__fmaf_rn(-root, root, x), half, root);
  }

  static __device__ __forceinline__ float reciprocal(float y) {
    float r = approximate_reciprocal(y);
    r = __fmaf_rn(r, __fmaf_rn(-y, r, 1.0f), r);
    return __fmaf_rn(r, __fmaf_rn(-y, r, 1.0f), r);
  }

  // Whether the float of these bits is in [2^kLow, 2^kHigh]. Negative numbers and NaN are not.
  template <int kLow, int kHigh>
  static __device__ __forceinline__ bool within(uint32_t bits) {
    constexpr uint32_t low = (127 + kLow) << 23, high = (127 + kHigh) << 23;
    return bits - low <= high - low;
  }
};

}  // namespace
}  // namespace fused_adamw
