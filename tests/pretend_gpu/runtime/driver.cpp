// The driver library, for Triton: its kernels are compiled and launched, but compute nothing.
#include <cuda.h>

#include <cstring>
#include <functional>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

// In the runtime library.
extern "C" int pretend_gpu_launch(void* stream, const char* name, std::function<void()>* work);
extern "C" int cudaGetDeviceCount(int* count);
extern "C" int cudaSetDevice(int device);
extern "C" int cudaGetDevice(int* device);

namespace {

CUresult launch(CUstream stream, CUfunction kernel) {
  std::function<void()> nothing = [] {};
  return static_cast<CUresult>(pretend_gpu_launch(stream, reinterpret_cast<const char*>(kernel), &nothing));
}

// The context of device d.
CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(static_cast<intptr_t>(device + 1)); }

}  // namespace

EXPORTED CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORTED CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDeviceGetCount(int* count) { return static_cast<CUresult>(cudaGetDeviceCount(count)); }
EXPORTED CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 3;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = 227 << 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 1 << 16;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = 0;
      break;
    default:
      *value = 1;
  }
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxGetCurrent(CUcontext* context) {
  int device;
  cudaGetDevice(&device);
  *context = context_of(device);
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxGetDevice(CUdevice* device) { return static_cast<CUresult>(cudaGetDevice(device)); }
EXPORTED CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 0;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
EXPORTED CUresult cuCtxSetCurrent(CUcontext context) {
  return static_cast<CUresult>(cudaSetDevice(static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1));
}
EXPORTED CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "error of the pretend GPU";
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuModuleLoadData(CUmodule* module, const void*) {
  *module = reinterpret_cast<CUmodule>(1);
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
EXPORTED CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(strdup(name));
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                                : 0;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
EXPORTED CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
EXPORTED CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr address) {
  *static_cast<CUdeviceptr*>(value) = address;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction kernel, void**, void**) {
  return launch(config->hStream, kernel);
}
EXPORTED CUresult cuLaunchKernel(CUfunction kernel, unsigned, unsigned, unsigned, unsigned, unsigned,
                                 unsigned, unsigned, CUstream stream, void**, void**) {
  return launch(stream, kernel);
}
