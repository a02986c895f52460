// Streams, captures, errors and the log.
#include "gpu.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace pretend_gpu {
namespace {

std::string option(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

std::vector<std::unique_ptr<Stream>>& streams() {
  static std::vector<std::unique_ptr<Stream>> all;
  return all;
}

thread_local int device_of_thread = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;
std::string fault;

}  // namespace

Gpu::Gpu() : is_late(option("PRETEND_GPU_STREAMS", "late") != "prompt") {}

Gpu& gpu() {
  static Gpu* the = new Gpu;  // outlives whatever still uses it when the process ends
  return *the;
}

int device_count() {
  static const int count = std::atoi(option("PRETEND_GPU_DEVICES", "2").c_str());
  return count;
}

int current_device() { return device_of_thread; }

// ---- Streams

Stream* new_stream() {
  streams().push_back(std::make_unique<Stream>(Stream{device_of_thread, {}, nullptr}));
  return streams().back().get();
}

Stream* stream_of(cudaStream_t handle) {
  if (handle && handle != cudaStreamLegacy && handle != cudaStreamPerThread) {
    return reinterpret_cast<Stream*>(handle);
  }
  static std::map<int, Stream*> defaults;
  Stream*& stream = defaults[device_of_thread];
  if (!stream) stream = new_stream();
  return stream;
}

void append(Stream* stream, std::string name, Work work) {
  if (stream->capture) {
    if (!name.empty()) note("captured " + name);
    stream->capture->operations.push_back({std::move(name), std::move(work)});
    return;
  }
  if (!name.empty()) note(name);
  if (gpu().is_late) {
    stream->pending.push_back({std::move(name), std::move(work)});
  } else {
    work();
  }
}

static void run_next(Stream* stream) {
  const Operation next = std::move(stream->pending.front());
  stream->pending.pop_front();
  next.work();
}

void run(Stream* stream) {
  while (!stream->pending.empty()) run_next(stream);
}

void run_until(const std::shared_ptr<Mark>& mark) {
  while (!mark->is_reached && !mark->stream->pending.empty()) run_next(mark->stream);
}

void run_everything() {
  for (const auto& stream : streams()) run(stream.get());
}

// ---- Captures

bool is_any_capture_active() {
  for (const auto& stream : streams()) {
    if (stream->capture) return true;
  }
  return false;
}

bool capture_forbids() {
  if (mode_of_thread == cudaStreamCaptureModeRelaxed) return false;
  for (const auto& stream : streams()) {
    if (stream->capture && stream->capture->mode != cudaStreamCaptureModeRelaxed) return true;
  }
  return false;
}

cudaError_t break_captures() {
  for (const auto& stream : streams()) {
    if (stream->capture) stream->capture->is_broken = true;
  }
  return failed(cudaErrorStreamCaptureUnsupported);
}

void leave_capture(const std::shared_ptr<Capture>& capture) {
  for (const auto& stream : streams()) {
    if (stream->capture == capture) stream->capture = nullptr;
  }
}

// ---- Errors

cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

void record_fault(const std::string& what) {
  note("fault " + what);
  if (fault.empty()) fault = what;
}

cudaError_t take_fault() {
  if (fault.empty()) return cudaSuccess;
  std::fprintf(stderr, "pretend GPU: %s\n", fault.c_str());
  fault.clear();
  return failed(cudaErrorIllegalAddress);
}

// ---- Log

void note(const std::string& entry) {
  static std::FILE* file =
      std::getenv("PRETEND_GPU_LOG") ? std::fopen(std::getenv("PRETEND_GPU_LOG"), "a") : nullptr;
  if (file) {
    std::fprintf(file, "%s\n", entry.c_str());
    std::fflush(file);
  }
  if (gpu().is_logging) gpu().log.push_back(entry);
}

}  // namespace pretend_gpu

using namespace pretend_gpu;

EXPORTED cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGetDevice(int* device) {
  *device = device_of_thread;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return failed(cudaErrorInvalidDevice);
  device_of_thread = device;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORTED cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORTED cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, mode_of_thread);
  return cudaSuccess;
}

// ---- What the extension's kernels (host/cuda_host.h) and Python (device.py) call

EXPORTED cudaError_t pretend_gpu_launch(cudaStream_t handle, const char* name, Work* work) {
  Lock lock;
  if (const cudaError_t error = take_fault()) return error;
  append(stream_of(handle), std::string("launch ") + name, *work);
  return cudaSuccess;
}
EXPORTED void pretend_gpu_call(cudaStream_t handle, const char* name, void (*work)()) {
  Lock lock;
  append(stream_of(handle), name, work);
}
EXPORTED bool pretend_gpu_is_live(const void* address, size_t bytes) {
  Lock lock;
  return is_live(address, bytes);
}
EXPORTED void pretend_gpu_fault(const char* what) {
  Lock lock;
  record_fault(what);
}
EXPORTED void pretend_gpu_synchronize() {
  Lock lock;
  run_everything();
}
EXPORTED void pretend_gpu_note(const char* entry) {
  Lock lock;
  note(entry);
}
EXPORTED void pretend_gpu_set_logging(bool is_logging) {
  Lock lock;
  gpu().is_logging = is_logging;
  if (is_logging) gpu().log.clear();
}
EXPORTED size_t pretend_gpu_log_size() { return gpu().log.size(); }
EXPORTED const char* pretend_gpu_log_entry(size_t i) { return gpu().log[i].c_str(); }
