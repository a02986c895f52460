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
};

template <typename... Layouts>
struct LayoutList {
  // Calls f with the layout of these formats. False: it is not on the list.
  template <typename F>
  ADAMW_HOST_FN bool visit(const FormatCodes& formats, const F& f) {
    return ((Layouts::Param::kCode == formats.param && Layouts::Grad::kCode == formats.grad &&
             Layouts::ExpAvg::kCode == formats.exp_avg && Layouts::ExpAvgSq::kCode == formats.exp_avg_sq &&
             (f(Layouts()), true)) ||
            ...);
  }
};

using CudaLayouts = LayoutList<
    // parameter, gradient, moments
    Layout<Float32, Float32, Float32>,     //
    Layout<Float32, Float32, BFloat16>,    //
    Layout<Float32, BFloat16, Float32>,    //
    Layout<Float32, BFloat16, BFloat16>,   //
    Layout<BFloat16, BFloat16, BFloat16>,  //
    Layout<BFloat16, BFloat16, Float32>,   //
    Layout<BFloat16, Float32, BFloat16>,   //
    Layout<BFloat16, Float32, Float32>,    //
    Layout<Float16, Float16, Float16>,     //
    Layout<Float16, Float16, Float32>,     //
    Layout<Float16, Float16, BFloat16>,    //
    Layout<Float16, Float32, Float16>,     //
    Layout<Float16, Float32, Float32>,     //
    Layout<Float64, Float64, Float64>>;

}  // namespace fused_adamw
