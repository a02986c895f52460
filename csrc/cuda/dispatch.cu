// CUDA: which object file has the update of a parameter format, and what the kernels were built for.
#include "kernels.h"
#include "layouts.h"
#include "switches.h"

#ifndef FUSED_ADAMW_CUDA_ARCHS
#define FUSED_ADAMW_CUDA_ARCHS ""
#endif
#define STRING_(a) #a
#define STRING(a) STRING_(a)

namespace fused_adamw {

bool cuda_supports(const FormatCodes& formats) {
  return share_arithmetic(formats) && CudaLayouts::visit(formats, [](auto) {});
}

const char* launch_update(const UpdateArgs& args, bool hypers_on_host, int device, void* stream) {
  const char* failure = "not built for these formats";
  if (!share_arithmetic(args.formats)) return failure;
  CudaLayouts::visit(args.formats, [&](auto layout) {
    failure = launch_update_of<typename decltype(layout)::Param>(args, hypers_on_host, device, stream);
  });
  return failure;
}

const char* cuda_version() { return STRING(__CUDACC_VER_MAJOR__) "." STRING(__CUDACC_VER_MINOR__); }

const char* cuda_archs() { return FUSED_ADAMW_CUDA_ARCHS; }

const char* cuda_switches() {
  return "fast_math=" STRING(FUSED_ADAMW_FAST_MATH) " reverse_update=" STRING(
      FUSED_ADAMW_REVERSE_UPDATE) " blocks_per_processor=" STRING(FUSED_ADAMW_BLOCKS_PER_PROCESSOR);
}

}  // namespace fused_adamw
