// THE formats, for host and device: how one value is kept in memory and what it is in a register. No rule, no
// loop, no address.
//
// A format has `Stored`, one element of a tensor; `Register`, the type of its arithmetic; load and store,
// which round to nearest even as torch does. The walks of cpu/ and cuda/ know formats by these four names
// alone. To add one, write its struct and its line in visit_format.
#pragma once

#include <string.h>
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "inline.h"
#include "tables.h"

namespace fused_adamw {

ADAMW_FN float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

ADAMW_FN uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct Float32 {
  static constexpr DType kDType = kFloat32;
  using Stored = float;
  using Register = float;
  ADAMW_FN float load(float x) { return x; }
  ADAMW_FN float store(float x) { return x; }
};

struct Float64 {
  static constexpr DType kDType = kFloat64;
  using Stored = double;
  using Register = double;
  ADAMW_FN double load(double x) { return x; }
  ADAMW_FN double store(double x) { return x; }
};

// On the host, bfloat16 and float16 are written so that compilers vectorise them; a GPU has instructions.
struct BFloat16 {
  static constexpr DType kDType = kBFloat16;
  using Stored = uint16_t;
  using Register = float;

  ADAMW_FN float load(uint16_t x) {
#if defined(__CUDA_ARCH__)
    return __bfloat162float(__ushort_as_bfloat16(x));
#else
    return as_float(static_cast<uint32_t>(x) << 16);
#endif
  }

  ADAMW_FN uint16_t store(float x) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    return static_cast<uint16_t>(round(x) >> 16);
#endif
  }

  // The upper half of the bits is the rounded value, the lower half noise.
  ADAMW_FN uint32_t round(float x) {
    const uint32_t bits = as_bits(x);
    return x == x ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fc00000u;
  }
};

struct Float16 {
  static constexpr DType kDType = kFloat16;
  using Stored = uint16_t;
  using Register = float;

  ADAMW_FN float load(uint16_t x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x));
#else
    // Shift the exponent into place, then let a multiplication rebias it: exact for subnormals too.
    const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
    const float rebiased = as_float(magnitude) * as_float(0x77800000);  // 2^112
    const uint32_t inf_or_nan = magnitude >= 0x0f800000 ? 0x7f800000u : 0u;
    return as_float(as_bits(rebiased) | inf_or_nan | static_cast<uint32_t>(x & 0x8000) << 16);
#endif
  }

  ADAMW_FN uint16_t store(float x) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(x));
#else
    const uint32_t bits = as_bits(x);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14 the addition of 0.5 leaves the rounded subnormal in the low bits.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
    uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? 0x7c00u : half;  // rounds to 65536 or above
    half = magnitude > 0x7f800000 ? 0x7e00u : half;
    return static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
#endif
  }
};

template <typename... Formats>
struct FormatList {
  // Calls f with the format of this number. False: there is none.
  template <typename F>
  ADAMW_HOST_FN bool visit(DType number, const F& f) {
    return ((number == Formats::kDType && (f(Formats()), true)) || ...);
  }
};

// Every format there is.
using Formats = FormatList<Float32, BFloat16, Float16, Float64>;

// Of the arithmetic of the format that has this number; 0: none has.
ADAMW_HOST_FN int64_t register_bytes(DType number) {
  int64_t bytes = 0;
  Formats::visit(number, [&](auto format) { bytes = sizeof(typename decltype(format)::Register); });
  return bytes;
}

// Whether tensors of these formats can be updated together: one arithmetic, float or double, serves them all.
ADAMW_HOST_FN bool share_arithmetic(DType param, DType grad, DType state) {
  const int64_t bytes = register_bytes(param);
  return bytes && register_bytes(grad) == bytes && register_bytes(state) == bytes;
}

}  // namespace fused_adamw
