// The host's side of CUDA under the emulation: a launch runs the kernel, and returns when it is done.
#pragma once

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

namespace emulation {
constexpr int kDevices = 4;  // device d holds d + 1 blocks at once
inline thread_local int current_device = 0;
}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t error) {
  return error ? "invalid device ordinal" : "no error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::kDevices) return cudaErrorInvalidDevice;
  emulation::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  if (device < 0 || device >= emulation::kDevices) return cudaErrorInvalidDevice;
  *value = device + 1;
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <typename Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 threads, void** arguments, size_t,
                             cudaStream_t) {
  const Params params = *static_cast<const Params*>(arguments[0]);  // a launch copies its arguments
  ++emulation::device.launches;
  emulation::device.last_grid = grid.x;
  emulation::run_grid([&] { kernel(params); }, grid, threads);
  return cudaSuccess;
}
