// Allocations, which of their blocks are in use, and copies.
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>

#include "gpu.h"

namespace pretend_gpu {
namespace {

template <typename Value>
using ByAddress = std::map<uintptr_t, Value>;

// The entry whose memory the address lies in, or the end.
template <typename Value, typename Bytes>
typename ByAddress<Value>::iterator containing(ByAddress<Value>& map, const void* address, Bytes bytes_of) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  auto it = map.upper_bound(at);
  if (it == map.begin()) return map.end();
  --it;
  return at < it->first + bytes_of(it->second) ? it : map.end();
}

ByAddress<Allocation> allocations;
ByAddress<size_t> blocks;  // in use, in the order in which streams run
bool blocks_are_known = false;

ByAddress<Allocation>::iterator find_allocation(const void* address) {
  return containing(allocations, address, [](const Allocation& a) { return a.bytes; });
}

cudaError_t allocate(void** address, size_t bytes, Memory kind, const char* name) {
  note(std::string("allocate ") + name + " " + std::to_string(bytes));
  constexpr size_t kAlignment = 4096;
  if (posix_memalign(address, kAlignment, bytes ? bytes : 1)) return failed(cudaErrorMemoryAllocation);
  std::memset(*address, kUnwritten, bytes);
  allocations[reinterpret_cast<uintptr_t>(*address)] = {bytes, kind, current_device()};
  return cudaSuccess;
}

void release(void* address) {
  const auto it = find_allocation(address);
  if (it == allocations.end()) return;
  const uintptr_t end = it->first + it->second.bytes;
  blocks.erase(blocks.lower_bound(it->first), blocks.lower_bound(end));
  std::memset(address, kFreed, it->second.bytes);
  allocations.erase(it);
  std::free(address);
}

Memory kind_of(const void* address) {
  const Allocation* allocation = allocation_of(address);
  return allocation ? allocation->kind : Memory::kPageable;
}

const char* name_of(Memory kind) {
  return kind == Memory::kDevice ? "device" : kind == Memory::kPinned ? "pinned" : "pageable";
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t handle, bool waits) {
  Stream* stream = stream_of(handle);
  const Memory source = kind_of(from), target = kind_of(to);
  const bool is_pageable = source == Memory::kPageable || target == Memory::kPageable;
  if (stream->capture && (waits || is_pageable)) return break_captures();
  append(stream, "copy " + std::to_string(bytes) + " " + name_of(source) + " to " + name_of(target),
         [=] { std::memcpy(to, from, bytes); });
  if (!waits && !is_pageable) return take_fault();
  note("synchronize pageable copy");
  run(stream);
  return take_fault();
}

}  // namespace

const Allocation* allocation_of(const void* address) {
  const auto it = find_allocation(address);
  return it == allocations.end() ? nullptr : &it->second;
}

bool is_live(const void* address, size_t bytes) {
  const auto end = reinterpret_cast<uintptr_t>(address) + bytes;
  if (!blocks_are_known) {
    const auto it = find_allocation(address);
    return it != allocations.end() && end <= it->first + it->second.bytes;
  }
  const auto it = containing(blocks, address, [](size_t size) { return size; });
  return it != blocks.end() && end <= it->first + it->second;
}

}  // namespace pretend_gpu

using namespace pretend_gpu;

// The caching allocator gives out a block, or takes it back. Both happen in the order of the stream it
// belongs to, and a graph repeats those of its capture. A block of a graph's own that is released later stays
// as it is: nothing but the graph writes there.
EXPORTED void pretend_gpu_block(uintptr_t address, size_t bytes, cudaStream_t handle, int device,
                                bool is_given, bool is_of_graph) {
  Lock lock;
  blocks_are_known = true;
  const int before = current_device();
  cudaSetDevice(device);
  Stream* stream = stream_of(handle);
  cudaSetDevice(before);
  const Work work = [=] {
    if (is_given) {
      blocks[address] = bytes;
    } else {
      blocks.erase(address);
    }
    std::memset(reinterpret_cast<void*>(address), is_given ? kUnwritten : kFreed, bytes);
  };
  Capture* capture = stream->capture.get();
  if (capture && is_given) capture->blocks.insert(address);
  const bool is_of_capture = capture && capture->blocks.count(address);
  if (is_of_graph && !is_given && !is_of_capture) return;
  if (capture && !is_of_capture) return work();
  append(stream, "", work);
}

// ---- Allocations

EXPORTED cudaError_t cudaMalloc(void** address, size_t bytes) {
  Lock lock;
  if (capture_forbids()) return break_captures();
  return allocate(address, bytes, Memory::kDevice, "device");
}
EXPORTED cudaError_t cudaFree(void* address) {
  Lock lock;
  run_everything();
  release(address);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  Lock lock;
  if (is_any_capture_active()) return break_captures();
  return allocate(address, bytes, Memory::kPinned, "pinned");
}
EXPORTED cudaError_t cudaFreeHost(void* address) {
  Lock lock;
  run_everything();
  release(address);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  Lock lock;
  allocations[reinterpret_cast<uintptr_t>(address)] = {bytes, Memory::kPinned, current_device()};
  return cudaSuccess;
}
EXPORTED cudaError_t cudaHostUnregister(void* address) {
  Lock lock;
  allocations.erase(reinterpret_cast<uintptr_t>(address));
  return cudaSuccess;
}
EXPORTED cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = size_t{20} << 30;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  Lock lock;
  std::memset(attributes, 0, sizeof *attributes);
  const Allocation* allocation = allocation_of(address);
  if (!allocation) {
    attributes->type = cudaMemoryTypeUnregistered;
    return cudaSuccess;
  }
  const bool is_pinned = allocation->kind == Memory::kPinned;
  attributes->type = is_pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  attributes->device = allocation->device;
  attributes->devicePointer = const_cast<void*>(address);
  attributes->hostPointer = is_pinned ? const_cast<void*>(address) : nullptr;
  return cudaSuccess;
}

// ---- Copies

EXPORTED cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                     cudaStream_t stream) {
  Lock lock;
  return copy(to, from, bytes, stream, false);
}
EXPORTED cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  Lock lock;
  return copy(to, from, bytes, nullptr, true);
}
EXPORTED cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                         cudaStream_t stream) {
  Lock lock;
  return copy(to, from, bytes, stream, false);
}
EXPORTED cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  Lock lock;
  append(stream_of(nullptr), "fill " + std::to_string(bytes), [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
EXPORTED cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  Lock lock;
  append(stream_of(stream), "fill " + std::to_string(bytes), [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
