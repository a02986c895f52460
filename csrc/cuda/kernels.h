// The CUDA launchers as bindings.cpp sees them: no torch, no CUDA types.
#pragma once

#include "../tables.h"

namespace fused_adamw {

// Hyper tables up to this size travel as kernel parameters (4 KiB in all) instead of as copies to the device.
constexpr int64_t kMaxInlineHypers = 60;

// Enqueue on `stream` of `device` and return; no host synchronisation. All pointers of `args` are to device
// memory, except that `hypers` is host memory where `hypers_on_host`. Null, or what went wrong.
const char* launch_norm(const NormArgs& args, int device, void* stream);
const char* launch_update(const UpdateArgs& args, bool hypers_on_host, int device, void* stream);

// The part of launch_update for parameters of one format; every format has an object file of its own.
template <typename Param>
const char* launch_update_of(const UpdateArgs& args, bool hypers_on_host, int device, void* stream);

// Whether launch_update has a kernel for these formats.
bool cuda_supports(const FormatCodes& formats);

// What the kernels were built with and for, such as "13.0" and "sm_80 sm_90 compute_120".
const char* cuda_version();
const char* cuda_archs();

// How switches.h was set.
const char* cuda_switches();

}  // namespace fused_adamw
