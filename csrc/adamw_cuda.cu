#include "adamw_cuda.h"
namespace fused_adamw {
const char* launch_norm(const NormArgs&, int, void*) { return "todo"; }
const char* launch_update(const UpdateArgs&, bool, int, void*) { return "todo"; }
const char* cuda_build() { return FUSED_ADAMW_CUDA_ARCHS; }
}
