// The combinations of formats that the CUDA kernels are compiled for: registers need types. All others of
// these tensors are left to the reference.
#pragma once

#include "../formats.h"

namespace fused_adamw {

// Formats of a parameter, its gradient and its moments.
template <typename P, typename G, typename S>
struct Layout {
  using Param = P;
  using Grad = G;
  using State = S;
};

template <typename... Layouts>
struct LayoutList {
  // Calls f with the layout of these formats. False: it is not on the list.
  template <typename F>
  ADAMW_HOST_FN bool visit(DType param, DType grad, DType state, const F& f) {
    return ((Layouts::Param::kDType == param && Layouts::Grad::kDType == grad &&
             Layouts::State::kDType == state && (f(Layouts()), true)) ||
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
