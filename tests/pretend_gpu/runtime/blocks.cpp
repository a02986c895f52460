// Tells the runtime which blocks torch's caching allocator gives out and takes back: to the runtime all of
// them are one allocation.
#include <c10/cuda/CUDACachingAllocator.h>

extern "C" void pretend_gpu_block(uintptr_t address, size_t bytes, cudaStream_t stream, int device,
                                  bool is_given, bool is_of_graph);

extern "C" __attribute__((visibility("default"))) void watch_blocks() {
  using c10::CachingDeviceAllocator::TraceEntry;
  c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker([](const TraceEntry& entry) {
    const bool is_given = entry.action_ == TraceEntry::ALLOC;
    if (!is_given && entry.action_ != TraceEntry::FREE_COMPLETED) return;
    pretend_gpu_block(entry.addr_, entry.size_, static_cast<cudaStream_t>(entry.stream_), entry.device_,
                      is_given, entry.mempool_ != c10::MempoolId_t{0, 0});
  });
}
