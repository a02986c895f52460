#include "direct.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#ifdef __linux__
#include <dlfcn.h>
#endif

namespace fused_adamw {
namespace {

// A function of a library that is loaded already; null if there is none of that name.
template <typename F>
F loaded(const char* library, const char* name) {
#ifdef __linux__
  if (void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) {
    void* const function = dlsym(handle, name);
    dlclose(handle);  // gives back this reference alone
    return reinterpret_cast<F>(function);
  }
#endif
  return nullptr;
}

// const at::Tensor& c10::TensorImpl::grad() const
TensorPlace (*const kGrad)(const void*) = loaded<TensorPlace (*)(const void*)>("libc10.so",
                                                                               "_ZNK3c1010TensorImpl4gradEv");
// void torch::autograd::impl::bump_version(const at::Tensor&)
void (*const kBumpVersion)(TensorPlace) =
    loaded<void (*)(TensorPlace)>("libtorch_cpu.so", "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE");

}  // namespace

bool has_direct() { return kGrad && kBumpVersion; }

TensorPlace grad_of(const void* tensor) { return kGrad(tensor); }

void* hold(TensorPlace tensor) {
  AtenTensorHandle held = nullptr;
  // The shim's handles are such places, and it does not change this one.
  const auto handle = reinterpret_cast<AtenTensorHandle>(const_cast<void*>(static_cast<const void*>(tensor)));
  return aoti_torch_new_tensor_handle(handle, &held) == AOTI_TORCH_SUCCESS ? held : nullptr;
}

void release(void* held) { aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(held)); }

void bump_version(const void* tensor) { kBumpVersion(&tensor); }

}  // namespace fused_adamw
