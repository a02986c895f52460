// The combinations of formats that the CUDA kernels are compiled for: registers need types. All others of
// these tensors are left to the reference.
#pragma once

#include <algorithm>

#include "../formats.h"

namespace fused_adamw {

// Formats of a parameter, its gradient and its moments. The maximum is kept as exp_avg is.
template <typename P, typename G, typename M, typename V = M>
struct Layout {
  using Param = P;
  using Grad = G;
  using ExpAvg = M;
  using ExpAvgSq = V;

  // Bytes of the widest element.
  static constexpr int kWidest = std::max({sizeof(typename P::Stored), sizeof(typename G::Stored),
                                           sizeof(typename M::Stored), sizeof(typename V::Stored)});
  static constexpr bool kTakesNoise = P::kTakesNoise || M::kTakesNoise || V::kTakesNoise;
  static constexpr bool kIsPlain = !kTakesNoise && P::kSide == kNoSide;
  static constexpr bool kHasCodes = M::kSide == kSidePerBlock;
  static constexpr bool kBesides = false;
  static_assert(kHasCodes == (V::kSide == kSidePerBlock), "both moments are codes, or neither");
};

// The same tensors, and what a step may do besides the rule: find out norms, move an average in whichever
// format. It has kernels of its own, as those of the rule need their registers.
template <typename L>
struct WithBesides : L {
  static constexpr int kWidest = std::max<int>(L::kWidest, sizeof(float));
  static constexpr bool kTakesNoise = true;
  static constexpr bool kIsPlain = false;
  static constexpr bool kBesides = true;
};

template <typename... Layouts>
struct LayoutList {
  // Calls f with the layout of these formats, whatever the average's. False: it is not on the list.
  template <typename F>
  ADAMW_HOST_FN bool visit(const FormatCodes& formats, const F& f) {
    return ((Layouts::Param::kCode == formats.param && Layouts::Grad::kCode == formats.grad &&
             Layouts::ExpAvg::kCode == formats.exp_avg && Layouts::ExpAvgSq::kCode == formats.exp_avg_sq &&
             (f(Layouts()), true)) ||
            ...);
  }
};

using CudaLayouts = LayoutList<
    // parameter, gradient, exp_avg, and exp_avg_sq where it is kept in another way
    Layout<Float32, Float32, Float32>,                                   //
    Layout<Float32, Float32, BFloat16>,                                  //
    Layout<Float32, Float32, BFloat16, StochasticBFloat16>,              //
    Layout<Float32, Float32, SignedRoot, UnsignedRoot>,                  //
    Layout<Float32, BFloat16, Float32>,                                  //
    Layout<Float32, BFloat16, BFloat16>,                                 //
    Layout<Float32, BFloat16, BFloat16, StochasticBFloat16>,             //
    Layout<Float32, BFloat16, SignedRoot, UnsignedRoot>,                 //
    Layout<BFloat16, BFloat16, BFloat16>,                                //
    Layout<BFloat16, BFloat16, Float32>,                                 //
    Layout<BFloat16, BFloat16, BFloat16, StochasticBFloat16>,            //
    Layout<BFloat16, BFloat16, SignedRoot, UnsignedRoot>,                //
    Layout<BFloat16, Float32, BFloat16>,                                 //
    Layout<BFloat16, Float32, Float32>,                                  //
    Layout<BFloat16, Float32, BFloat16, StochasticBFloat16>,             //
    Layout<BFloat16, Float32, SignedRoot, UnsignedRoot>,                 //
    Layout<StochasticBFloat16, BFloat16, BFloat16>,                      //
    Layout<StochasticBFloat16, BFloat16, Float32>,                       //
    Layout<StochasticBFloat16, BFloat16, BFloat16, StochasticBFloat16>,  //
    Layout<StochasticBFloat16, BFloat16, SignedRoot, UnsignedRoot>,      //
    Layout<StochasticBFloat16, Float32, BFloat16>,                       //
    Layout<StochasticBFloat16, Float32, Float32>,                        //
    Layout<StochasticBFloat16, Float32, BFloat16, StochasticBFloat16>,   //
    Layout<StochasticBFloat16, Float32, SignedRoot, UnsignedRoot>,       //
    Layout<SplitBFloat16, BFloat16, BFloat16>,                           //
    Layout<SplitBFloat16, BFloat16, Float32>,                            //
    Layout<SplitBFloat16, BFloat16, BFloat16, StochasticBFloat16>,       //
    Layout<SplitBFloat16, BFloat16, SignedRoot, UnsignedRoot>,           //
    Layout<SplitBFloat16, Float32, BFloat16>,                            //
    Layout<SplitBFloat16, Float32, Float32>,                             //
    Layout<SplitBFloat16, Float32, BFloat16, StochasticBFloat16>,        //
    Layout<SplitBFloat16, Float32, SignedRoot, UnsignedRoot>,            //
    Layout<Float16, Float16, Float16>,                                   //
    Layout<Float16, Float16, Float32>,                                   //
    Layout<Float16, Float16, BFloat16>,                                  //
    Layout<Float16, Float16, BFloat16, StochasticBFloat16>,              //
    Layout<Float16, Float16, SignedRoot, UnsignedRoot>,                  //
    Layout<Float16, Float32, Float16>,                                   //
    Layout<Float16, Float32, Float32>,                                   //
    Layout<Float16, Float32, BFloat16, StochasticBFloat16>,              //
    Layout<Float16, Float32, SignedRoot, UnsignedRoot>,                  //
    Layout<Float64, Float64, Float64>>;

}  // namespace fused_adamw
