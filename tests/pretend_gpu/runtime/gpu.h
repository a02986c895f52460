// A GPU that is not there: its memory is host memory, its streams are queues of functions.
//
// Nothing runs before something waits for it, the latest that a real stream may run, unless
// PRETEND_GPU_STREAMS=prompt. What a capture forbids fails as it would on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace pretend_gpu {

constexpr int kUnwritten = 0xcd;  // bytes of memory that was allocated and never written
constexpr int kFreed = 0xdd;      // bytes of memory that was freed

using Work = std::function<void()>;

struct Operation {
  std::string name;  // as the log shows it; empty: bookkeeping that it does not show
  Work work;
};

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  bool is_broken = false;  // a call was made that a capture forbids
  std::vector<Operation> operations;
  std::set<uintptr_t> blocks = {};  // that were given out in it
};

struct Stream {
  int device;
  std::deque<Operation> pending;
  std::shared_ptr<Capture> capture;  // null: operations are for running
};

// A place in a stream, as an event records it.
struct Mark {
  Stream* stream;
  std::shared_ptr<Capture> capture;  // the event was recorded in a capture
  bool is_reached = false;
};

struct Gpu {
  std::recursive_mutex mutex;
  bool is_late;
  bool is_logging = false;
  std::vector<std::string> log;

  Gpu();
};

Gpu& gpu();

// Held by every function of the runtime.
struct Lock {
  std::lock_guard<std::recursive_mutex> guard{gpu().mutex};
};

int device_count();
int current_device();

// ---- Streams

Stream* new_stream();
Stream* stream_of(cudaStream_t handle);  // null and the legacy handles: the current device's default stream
void append(Stream* stream, std::string name, Work work);
void run(Stream* stream);
void run_until(const std::shared_ptr<Mark>& mark);
void run_everything();

// ---- Captures

// Whether a stream is being captured and this thread may not make calls that are unsafe then.
bool capture_forbids();
bool is_any_capture_active();
cudaError_t break_captures();  // a forbidden call invalidates them
void leave_capture(const std::shared_ptr<Capture>& capture);

// ---- Errors

cudaError_t failed(cudaError_t error);  // remembers it for cudaGetLastError
// A kernel went wrong. The next launch or wait reports it, once, so that later tests can go on.
void record_fault(const std::string& what);
cudaError_t take_fault();

// ---- Log

void note(const std::string& entry);

// ---- Memory

enum class Memory { kPageable, kPinned, kDevice };
struct Allocation {
  size_t bytes;
  Memory kind;
  int device;
};
const Allocation* allocation_of(const void* address);
// Whether all these bytes belong to a block that the caching allocator has given out.
bool is_live(const void* address, size_t bytes);

}  // namespace pretend_gpu
