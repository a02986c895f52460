// What both CUDA kernels share: vectors of memory, the walk over chunks, sums over threads, the launcher.
//
// Kernels run as many blocks as the GPU holds at once, and the blocks stride over the chunk table. What a
// chunk yields does not depend on which block works on it, so neither does any result depend on the GPU.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstring>
#include <type_traits>

#include "../formats.h"

namespace fused_adamw {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;  // the widest access of one thread
// Positions inside a chunk are 32-bit; those inside a row are 64-bit.
constexpr int64_t kMaxChunkSize = 1 << 30;

// ---- Memory

// N neighbours that move in one access, and what CUDA calls an access of so many bytes.
template <typename T, int N>
struct Vector {
  T at[N];
};
template <int kBytes>
using Bits =
    std::conditional_t<kBytes == 1, unsigned char,
                       std::conditional_t<kBytes == 2, unsigned short,
                                          std::conditional_t<kBytes == 4, unsigned int,
                                                             std::conditional_t<kBytes == 8, uint2, uint4>>>>;

template <int N, typename T>
__device__ __forceinline__ bool aligned(const T* p) {
  return reinterpret_cast<uint64_t>(p) % (N * sizeof(T)) == 0;
}

// An address from a table says nothing about where it points, and a plain access through it would be a
// generic one. These are the global load and store with the default caching.
template <typename T, int N>
__device__ __forceinline__ void load(Vector<T, N>* to, const T* from) {
  const auto bits = __ldca(reinterpret_cast<const Bits<N * sizeof(T)>*>(from));
  memcpy(to, &bits, sizeof bits);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& from) {
  Bits<N * sizeof(T)> bits;
  memcpy(&bits, &from, sizeof bits);
  __stwb(reinterpret_cast<decltype(bits)*>(to), bits);
}

// The elements of a row that a chunk covers.
struct Span {
  int64_t start;
  int n;
};

__device__ __forceinline__ Span span_of(const Table& table, const Row& row, const Chunk& chunk) {
  const int64_t start = chunk.index * table.chunk_size;
  const int64_t left = row.numel - start;
  return {start, static_cast<int>(left < table.chunk_size ? left : table.chunk_size)};
}

// A block of codes: the row of the matrix it is cut from, the column and the element that it starts at, its
// number among all, which is that of its side, and its values.
struct CodeBlock {
  int64_t row, column, start, number;
  int n;
};

// The blocks of codes that start in a span: those of a chunk. The last one may end after it.
struct CodeBlocks {
  int64_t columns;   // of the matrix
  int64_t row;       // of the first block
  uint32_t per_row;  // blocks of a row of the matrix
  uint32_t skipped;  // blocks of the first row that start before the span
  int n;

  __device__ __forceinline__ CodeBlocks(const Row& row, const Span& span)
      : columns(row.local_columns),
        row(span.start / columns),
        per_row(static_cast<uint32_t>((columns + kCodeBlock - 1) / kCodeBlock)) {
    const int64_t column = span.start - this->row * columns;
    skipped = starting_before(column);
    n = starting_before(column + span.n) - skipped;
  }

  // The i-th block of the span; one without values where i is too large.
  __device__ __forceinline__ CodeBlock at(int i) const {
    const uint32_t number = skipped + i, rows = number / per_row;
    const int64_t column = (number - rows * per_row) * kCodeBlock, left = columns - column;
    const int width = static_cast<int>(left < kCodeBlock ? left : kCodeBlock);
    const int64_t r = row + rows;
    return {r, column, r * columns + column, row * per_row + number, i < n ? width : 0};
  }

 private:
  // How many blocks, from the first row's first on, start before some element of it, or of a later row.
  __device__ __forceinline__ uint32_t starting_before(int64_t element) const {
    const int64_t rows = element / columns, column = element - rows * columns;
    return static_cast<uint32_t>(rows * per_row + (column + kCodeBlock - 1) / kCodeBlock);
  }
};

// ---- Across threads and blocks

// The maximum over each kLanes neighbouring threads of a warp, in each of them. To be called by whole warps.
template <int kLanes>
__device__ __forceinline__ uint32_t lanes_maximum(uint32_t x) {
  for (int offset = kLanes / 2; offset; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffff, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// The sum over the threads of the block, the same bits in each of them.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double warp_sums[kThreads / 32];
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  __syncthreads();  // the last call's sums have been read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0.0;
  for (double warp_sum : warp_sums) sum += warp_sum;
  return sum;
}

// True in the block that gets here last; it sees what all others wrote. The count wraps to 0 for the next
// launch.
__device__ __forceinline__ bool last_block(uint32_t* ticket) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// ---- Launcher

#define RETURN_IF_ERROR(call)                                                    \
  if (const cudaError_t error = (call)) {                                        \
    cudaGetLastError(); /* taken off, so that no later call reports it as its */ \
    return cudaGetErrorString(error);                                            \
  }

// On the current device: as many blocks as it holds at once, and no more than there are chunks. At least one:
// there may be a sum to zero, a status to write or an empty parameter to count.
template <auto kKernel, typename Params>
const char* launch_here(const Params& params, const Table& table, int device, void* stream) {
  constexpr int kDevices = 64;
  // 0: not asked yet. Threads that ask at once get the same answer.
  static std::atomic<int> resident[kDevices];
  int blocks = device < kDevices ? resident[device].load(std::memory_order_relaxed) : 0;
  if (!blocks) {
    int processors, per_processor;
    RETURN_IF_ERROR(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    RETURN_IF_ERROR(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kKernel, kThreads, 0));
    blocks = processors * per_processor;
    if (device < kDevices) resident[device].store(blocks, std::memory_order_relaxed);
  }
  if (table.n_chunks < blocks) blocks = table.n_chunks > 0 ? static_cast<int>(table.n_chunks) : 1;
  void* arguments[] = {const_cast<Params*>(&params)};
  RETURN_IF_ERROR(cudaLaunchKernel(kKernel, dim3(blocks), dim3(kThreads), arguments, 0,
                                   static_cast<cudaStream_t>(stream)));
  return nullptr;
}

template <auto kKernel, typename Params>
const char* launch(const Params& params, const Table& table, int device, void* stream) {
  if (table.chunk_size <= 0 || table.chunk_size > kMaxChunkSize) return "chunk_size is out of range";
  int current;
  RETURN_IF_ERROR(cudaGetDevice(&current));
  if (current == device) return launch_here<kKernel>(params, table, device, stream);
  RETURN_IF_ERROR(cudaSetDevice(device));
  const char* failure = launch_here<kKernel>(params, table, device, stream);
  RETURN_IF_ERROR(cudaSetDevice(current));
  return failure;
}

}  // namespace
}  // namespace fused_adamw
