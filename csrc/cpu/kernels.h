// The CPU kernels, compiled once per instruction set; bindings.cpp picks one set when the library loads.
#pragma once

#include "../formats.h"
#include "../tables.h"

namespace fused_adamw {

struct CpuKernels {
  const char* capability;
  // Updates chunks [begin, end) of tensors that share their arithmetic. Step counts are read, not advanced.
  void (*update_chunks)(const UpdateArgs&, double grad_scale, int64_t begin, int64_t end);
  // partials[i] = sum of squares of chunk i, for i in [begin, end).
  void (*norm_chunks)(const NormArgs&, int64_t begin, int64_t end);
};

extern const CpuKernels kCpuKernelsBaseline;
extern const CpuKernels kCpuKernelsAvx2;
extern const CpuKernels kCpuKernelsAvx512;
extern const CpuKernels kCpuKernelsAvx512Bf16;

}  // namespace fused_adamw
