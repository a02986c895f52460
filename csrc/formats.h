// THE formats, for host and device: how one value is kept in memory and what it is in a register. No rule, no
// loop, no address.
//
// A format has a number, `kCode`; `Stored`, one element of a tensor; `Register`, the type of its arithmetic;
// load and store, which round to nearest even as torch does. Some keep a `Side` beside the values, and some
// take noise (noise.h) to store: `kSide` and `kTakesNoise` say which. The walks of cpu/ and cuda/ know
// formats by these names alone. To add one, write its struct and put it on the lists of what may be kept so.
//
// fused_adamw/formats.py defines them for whole tensors.
#pragma once

#include <math.h>
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

// a or b, by bits: compilers turn what follows a conditional expression into branches, which no vector takes.
ADAMW_FN float select(bool condition, float a, float b) {
  const uint32_t mask = condition ? 0xffffffffu : 0u;
  return as_float((as_bits(a) & mask) | (as_bits(b) & ~mask));
}

enum SideKind { kNoSide, kSidePerValue, kSidePerBlock };

// What a format is, unless it says otherwise.
struct Plain {
  using Side = void;
  static constexpr SideKind kSide = kNoSide;
  static constexpr bool kTakesNoise = false;
};

struct Float32 : Plain {
  static constexpr FormatCode kCode = kFloat32;
  using Stored = float;
  using Register = float;
  ADAMW_FN float load(float x) { return x; }
  ADAMW_FN float store(float x) { return x; }
};

struct Float64 : Plain {
  static constexpr FormatCode kCode = kFloat64;
  using Stored = double;
  using Register = double;
  ADAMW_FN double load(double x) { return x; }
  ADAMW_FN double store(double x) { return x; }
};

// On the host, bfloat16 and float16 are written so that compilers vectorise them; a GPU has instructions.
struct BFloat16 : Plain {
  static constexpr FormatCode kCode = kBFloat16;
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

struct Float16 : Plain {
  static constexpr FormatCode kCode = kFloat16;
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

// Rounds up as often as the dropped bits say: right on average, however small the change. `noise`: 16 bits.
struct StochasticBFloat16 : Plain {
  static constexpr FormatCode kCode = kStochasticBFloat16;
  static constexpr bool kTakesNoise = true;
  using Stored = uint16_t;
  using Register = float;

  ADAMW_FN float load(uint16_t x) { return BFloat16::load(x); }

  ADAMW_FN uint16_t store(float x, uint32_t noise) {
    const uint32_t bits = as_bits(x);
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t upper = (magnitude + noise) >> 16;
    upper = upper < 0x7f7f ? upper : 0x7f7fu;  // a finite number stays finite
    upper = magnitude < 0x7f800000 ? upper : 0x7f80u;
    upper = magnitude > 0x7f800000 ? 0x7fc0u : upper;
    return static_cast<uint16_t>(upper | (bits >> 16 & 0x8000));
  }
};

// A float32 in two halves: bfloat16, rounded with ties away from zero, and the low 16 bits as a signed
// difference. The bfloat16 has the last word: a residual that no store gives for it counts as 0.
struct SplitBFloat16 : Plain {
  static constexpr FormatCode kCode = kSplitBFloat16;
  static constexpr SideKind kSide = kSidePerValue;
  using Stored = uint16_t;
  using Side = int16_t;
  using Register = float;

  ADAMW_FN float load(uint16_t x, int16_t residual) {
    const uint32_t magnitude = x & 0x7fffu;
    const bool stale = magnitude > 0x7f80 || (residual < 0 ? magnitude == 0 : magnitude == 0x7f80);
    const uint32_t low = static_cast<uint32_t>(static_cast<int32_t>(stale ? 0 : residual));
    return as_float((static_cast<uint32_t>(x) << 16) + low);
  }

  ADAMW_FN uint16_t store(float x, int16_t& residual) {
    uint32_t bits = as_bits(x);
    bits = x == x ? bits : (bits & 0x80000000) | 0x7fc00000u;
    residual = static_cast<int16_t>(bits & 0xffff);
    return static_cast<uint16_t>((bits + 0x8000) >> 16);
  }
};

// Values of one block share a side.
constexpr int64_t kCodeBlock = 128;

// 8 bits per value: its root as a fraction of the block's, whose root is the side. The largest value has the
// top code, so what was loaded is stored as it was. Unsigned codes are 0 for zeros alone. A block with an
// infinity or a NaN is NaN everywhere. Products, quotients and roots are rounded once each.
template <typename Code, int kRoots, int kLevels, int kUnitBits>
struct RootCode : Plain {
  static constexpr SideKind kSide = kSidePerBlock;
  static constexpr bool kTakesNoise = true;
  using Stored = Code;
  using Side = float;
  using Register = float;
  static constexpr bool kSigned = static_cast<Code>(-1) < 0;
  static constexpr FormatCode kCode = kSigned ? kSignedRoot : kUnsignedRoot;
  static constexpr float kTop = kLevels;
  static constexpr float kUnit = 1.0f / static_cast<float>(1u << kUnitBits);

  // Orders NaN > infinity > finite: the maximum over a block, as an integer, is what `side` takes.
  ADAMW_FN uint32_t magnitude(float x) { return as_bits(x) & 0x7fffffff; }

  // At least kTop * kUnit, so that every code stands for a normal number; 0 for a block of zeros.
  ADAMW_FN float side(uint32_t largest) {
    const float t = root(as_float(largest));
    const bool zeros = kSigned ? t < kUnit : t == 0.0f;
    const float floored = t < kTop * kUnit ? kTop * kUnit : t;
    return largest >= 0x7f800000 ? as_float(0x7fc00000) : zeros ? 0.0f : floored;
  }

  // The factors of a block, one division each.
  ADAMW_FN float root_per_code(float side) { return side / kTop; }
  ADAMW_FN float codes_per_root(float side) { return kTop / side; }

  ADAMW_FN float load(Code code, float side, float root_per_code) {
    const int32_t wide = code, sign = wide >> 31, magnitude = (wide ^ sign) - sign;
    float x = select(magnitude == kLevels, side, static_cast<float>(magnitude) * root_per_code);
    for (int i = 0; i < kRoots; ++i) x = x * x;
    return as_float(as_bits(x) | (static_cast<uint32_t>(sign) & 0x80000000));
  }

  // Stochastic: `noise` has 16 bits.
  ADAMW_FN Code store(float x, float side, float codes_per_root, uint32_t noise) {
    const float z = place(x, side, codes_per_root);
    return finish((static_cast<int32_t>(rintf(z * 65536.0f)) + static_cast<int32_t>(noise)) >> 16, x, side);
  }

  // To nearest, ties to even: when a state is loaded.
  ADAMW_FN Code store(float x, float side, float codes_per_root) {
    return finish(static_cast<int32_t>(rintf(place(x, side, codes_per_root))), x, side);
  }

 private:
  ADAMW_FN float root(float x) {
    for (int i = 0; i < kRoots; ++i) x = sqrtf(x);
    return x;
  }

  // Between the codes: 0 to kTop. Of a block of zeros or NaN, any.
  ADAMW_FN float place(float x, float side, float codes_per_root) {
    const float w = root(as_float(magnitude(x)));
    const float z = select(w == side, kTop, w * codes_per_root);
    return select(z < kTop, z, kTop);
  }

  ADAMW_FN Code finish(int32_t code, float x, float side) {
    const int32_t live = side > 0.0f ? -1 : 0, sign = static_cast<int32_t>(as_bits(x)) >> 31;
    const int32_t least = (as_bits(x) << 1) != 0;
    if (kSigned) return static_cast<Code>(((code ^ sign) - sign) & live);
    return static_cast<Code>((code < least ? least : code) & live);
  }
};

using SignedRoot = RootCode<int8_t, 2, 127, 31>;
using UnsignedRoot = RootCode<uint8_t, 3, 255, 15>;

template <typename... Formats>
struct FormatList {
  // Calls f with the format of this number. False: there is none.
  template <typename F>
  ADAMW_HOST_FN bool visit(FormatCode number, const F& f) {
    return ((number == Formats::kCode && (f(Formats()), true)) || ...);
  }
};

// Those that are as torch has them: what a gradient may be.
using PlainFormats = FormatList<Float32, BFloat16, Float16, Float64>;
using ParamFormats = FormatList<Float32, BFloat16, Float16, Float64, StochasticBFloat16, SplitBFloat16>;
// The maximum is kept like exp_avg, and stochastic rounding would only let it grow.
using ExpAvgFormats = FormatList<Float32, BFloat16, Float16, Float64, SignedRoot>;
using ExpAvgSqFormats = FormatList<Float32, BFloat16, Float16, Float64, StochasticBFloat16, UnsignedRoot>;
// An average of parameters. It moves by too little at a time for rounding to nearest in bfloat16.
using AverageFormats = FormatList<Float32, Float64, StochasticBFloat16>;
// Every format.
using Formats = FormatList<Float32, BFloat16, Float16, Float64, StochasticBFloat16, SplitBFloat16, SignedRoot,
                           UnsignedRoot>;

// Of the arithmetic of the format that has this number; 0: none on the list has.
template <typename List>
ADAMW_HOST_FN int64_t register_bytes(FormatCode number) {
  int64_t bytes = 0;
  List::visit(number, [&](auto format) { bytes = sizeof(typename decltype(format)::Register); });
  return bytes;
}

// Whether f is true of the format of anything that is stored.
template <typename F>
ADAMW_HOST_FN bool any_stored(const FormatCodes& formats, const F& f) {
  bool any = false;
  const FormatCode stored[] = {formats.param, formats.exp_avg, formats.exp_avg_sq, formats.average};
  for (const FormatCode number : stored) {
    Formats::visit(number, [&](auto format) { any |= f(format); });
  }
  return any;
}

// Whether a parameter is kept in 16 bits that are those of a bfloat16.
ADAMW_FN constexpr bool is_bfloat16(FormatCode param) {
  return param == kBFloat16 || param == kStochasticBFloat16 || param == kSplitBFloat16;
}

ADAMW_HOST_FN bool take_noise(const FormatCodes& formats) {
  return any_stored(formats, [](auto format) { return decltype(format)::kTakesNoise; });
}

// Whether rows are cut into blocks that share a side.
ADAMW_HOST_FN bool have_blocks(const FormatCodes& formats) {
  return any_stored(formats, [](auto format) { return decltype(format)::kSide == kSidePerBlock; });
}

// Whether tensors of these formats can be updated together: one arithmetic, float or double, serves them all.
// The codes of exp_avg_sq, which has no sign, go with those of exp_avg.
ADAMW_HOST_FN bool share_arithmetic(const FormatCodes& formats) {
  const int64_t bytes = register_bytes<PlainFormats>(formats.grad);
  return bytes && register_bytes<ParamFormats>(formats.param) == bytes &&
         register_bytes<ExpAvgFormats>(formats.exp_avg) == bytes &&
         register_bytes<ExpAvgSqFormats>(formats.exp_avg_sq) == bytes &&
         (formats.average == kNoFormat || register_bytes<AverageFormats>(formats.average) == bytes) &&
         (formats.exp_avg_sq != kUnsignedRoot || formats.exp_avg == kSignedRoot);
}

}  // namespace fused_adamw
