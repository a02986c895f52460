// CUDA: one norm kernel, one update kernel, their launchers. No torch: plain nvcc compiles this file.
//
// Both kernels run as many blocks as the GPU holds at once, and the blocks stride over the chunk table. What
// a chunk yields does not depend on which block works on it, so neither does any result depend on the GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cfloat>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "adamw.h"
#include "adamw_cuda.h"

#ifndef FUSED_ADAMW_CUDA_ARCHS
#define FUSED_ADAMW_CUDA_ARCHS ""
#endif
#define STRING_(a) #a
#define STRING(a) STRING_(a)

namespace fused_adamw {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;  // the widest access of one thread
// Positions inside a chunk are 32-bit; those inside a row are 64-bit.
constexpr int64_t kMaxChunkSize = 1 << 30;

// ---- Types and memory

template <DType kDType>  // in the order of DType
using Storage = std::tuple_element_t<kDType, std::tuple<float, __nv_bfloat16, __half, double>>;

template <typename T>
using Arithmetic = std::conditional_t<sizeof(T) == 8, double, float>;

// N neighbours that move in one access, and what CUDA calls an access of so many bytes.
template <typename T, int N>
struct Vector {
  T at[N];
};
template <int kBytes>
using Bits = std::conditional_t<
    kBytes == 2, unsigned short,
    std::conditional_t<kBytes == 4, unsigned int, std::conditional_t<kBytes == 8, uint2, uint4>>>;

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

// ---- Across threads and blocks

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

// ---- Norm

// One thread's share of a sum of squares: a few squares at a time in Sum, then on in double, which keeps
// double arithmetic rare where it is slow. Which elements a thread adds, and in which order, does not depend
// on alignment.
template <typename Sum, typename G>
__device__ __forceinline__ double thread_sum_of_squares(const G* g, int n) {
  constexpr int N = kVectorBytes / sizeof(G);
  constexpr int kUnroll = 4;
  const bool vectors = aligned<N>(g);
  double sum = 0.0;
  for (int i = threadIdx.x * N; i < n; i += kUnroll * kThreads * N) {
    Vector<G, N> x[kUnroll];
    if (vectors && i + (kUnroll - 1) * kThreads * N + N <= n) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) load(&x[u], g + i + u * kThreads * N);
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const int j = i + u * kThreads * N + k;
          x[u].at[k] = j < n ? g[j] : G(0.0f);
        }
      }
    }
    Sum squares[kUnroll] = {};
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const Sum x_k = static_cast<Arithmetic<G>>(x[u].at[k]);
        squares[u] += x_k * x_k;
      }
    }
    sum += (squares[0] + squares[1]) + (squares[2] + squares[3]);
  }
  return sum;
}

template <typename G>
__device__ __forceinline__ double sum_of_squares(const G* g, int n) {
  const double sum = block_sum(thread_sum_of_squares<Arithmetic<G>>(g, n));
  // A square may have overflowed float32: as on the CPU, the norm is finite wherever the gradients are.
  return sum <= DBL_MAX ? sum : block_sum(thread_sum_of_squares<double>(g, n));
}

template <typename G>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormArgs args) {
  for (int64_t i = blockIdx.x; i < args.table.n_chunks; i += gridDim.x) {
    const Chunk chunk = args.table.chunks[i];
    const Row& row = args.table.rows[chunk.row];
    const Span span = span_of(args.table, row, chunk);
    const double sum =
        row.grad ? sum_of_squares(reinterpret_cast<const G*>(row.grad) + span.start, span.n) : 0.0;
    if (threadIdx.x == 0) args.partials[i] = sum;
  }
  if (!last_block(args.ticket)) return;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < args.table.n_chunks; i += kThreads) sum += __ldcg(args.partials + i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) *args.sum = sum;
}

// ---- Update

// Applies the rule to n elements, N at a time.
template <int N, bool kAmsgrad, typename P, typename G, typename S, typename T>
__device__ __forceinline__ void update_vectors(P* p, const G* g, S* m, S* v, S* v_max, int n,
                                               const Coefficients<T>& c) {
  for (int i = threadIdx.x * N; i < n; i += kThreads * N) {
    Vector<P, N> p_i;
    Vector<G, N> g_i;
    Vector<S, N> m_i, v_i, v_max_i;
    load(&p_i, p + i);
    load(&g_i, g + i);
    load(&m_i, m + i);
    load(&v_i, v + i);
    if (kAmsgrad) load(&v_max_i, v_max + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      T p_k = static_cast<T>(p_i.at[k]), m_k = static_cast<T>(m_i.at[k]), v_k = static_cast<T>(v_i.at[k]);
      T v_max_k = kAmsgrad ? static_cast<T>(v_max_i.at[k]) : T(0);
      adamw_update<T>(p_k, static_cast<T>(g_i.at[k]), m_k, v_k, v_max_k, c);
      p_i.at[k] = P(p_k);
      m_i.at[k] = S(m_k);
      v_i.at[k] = S(v_k);
      if (kAmsgrad) v_max_i.at[k] = S(v_max_k);
    }
    store(p + i, p_i);
    store(m + i, m_i);
    store(v + i, v_i);
    if (kAmsgrad) store(v_max + i, v_max_i);
  }
}

// The widest type of a row moves in whole 16-byte vectors, and narrower ones in as many elements:
// neighbouring threads then touch neighbouring bytes of every tensor, so each sector of memory moves once.
// Rows that are not aligned for that, and what a chunk leaves over, go element by element.
template <bool kAmsgrad, typename P, typename G, typename S, typename T>
__device__ __forceinline__ void update_span(const Row& row, const Span& span, const Coefficients<T>& c) {
  constexpr int kWidest = sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S);
  constexpr int N = kVectorBytes / (kWidest > sizeof(G) ? kWidest : sizeof(G));
  P* p = reinterpret_cast<P*>(row.param) + span.start;
  const G* g = reinterpret_cast<const G*>(row.grad) + span.start;
  S* m = reinterpret_cast<S*>(row.exp_avg) + span.start;
  S* v = reinterpret_cast<S*>(row.exp_avg_sq) + span.start;
  S* v_max = kAmsgrad ? reinterpret_cast<S*>(row.max_exp_avg_sq) + span.start : v;
  const bool vectors = aligned<N>(p) && aligned<N>(g) && aligned<N>(m) && aligned<N>(v) && aligned<N>(v_max);
  const int n = vectors ? span.n / N * N : 0;
  update_vectors<N, kAmsgrad>(p, g, m, v, v_max, n, c);
  update_vectors<1, kAmsgrad>(p + n, g + n, m + n, v + n, v_max + n, span.n - n, c);
}

struct UpdateParams {
  UpdateArgs args;  // hypers: null where the table is here
  Hyper hypers[kMaxInlineHypers];
};
static_assert(sizeof(UpdateParams) <= 4096, "kernel parameters are limited to 4 KiB");

// Three blocks of a processor have 48 KB of loads in flight, and a thread of theirs 80 registers (in double:
// two blocks, 32 KB, 128 registers), which hold its vectors without spilling.
template <typename P, typename G, typename S>
__global__ void __launch_bounds__(kThreads, sizeof(P) == 8 ? 2 : 3)
    update_kernel(const __grid_constant__ UpdateParams params) {
  using T = Arithmetic<P>;
  __shared__ StepScalars scalars;
  __shared__ Coefficients<T> shared_coefficients;
  const UpdateArgs& args = params.args;
  const Hyper* hypers = args.hypers ? args.hypers : params.hypers;

  // Double precision is slow on many GPUs: one thread works the scalars out for its block.
  if (threadIdx.x == 0) {
    scalars = step_scalars(args.inputs);
    if (blockIdx.x == 0) {
      args.inputs.status[0] = scalars.grad_norm;
      if (scalars.skip) args.inputs.status[1] += 1.0;
    }
  }
  __syncthreads();
  if (scalars.skip) return;

  // Neighbouring rows mostly share a group and a step count: keep what was worked out.
  Coefficients<T> c{};
  int64_t hyper = -1;
  float step = -1.0f;
  for (int64_t i = blockIdx.x; i < args.table.n_chunks; i += gridDim.x) {
    const Chunk chunk = args.table.chunks[i];
    const Row& row = args.table.rows[chunk.row];
    if (!row.grad) continue;
    const float row_step = *reinterpret_cast<const float*>(row.step) + 1.0f;
    if (row.hyper != hyper || row_step != step) {
      hyper = row.hyper;
      step = row_step;
      __syncthreads();  // the last coefficients have been read
      if (threadIdx.x == 0) shared_coefficients = coefficients<T>(hypers[hyper], step, scalars.grad_scale);
      __syncthreads();
      c = shared_coefficients;
    }
    const Span span = span_of(args.table, row, chunk);
    if (row.max_exp_avg_sq) {
      update_span<true, P, G, S>(row, span, c);
    } else {
      update_span<false, P, G, S>(row, span, c);
    }
  }

  // Every block has read the step counts by now.
  if (!last_block(args.ticket)) return;
  for (int64_t i = threadIdx.x; i < args.table.n_rows; i += kThreads) {
    const Row& row = args.table.rows[i];
    if (row.grad) *reinterpret_cast<float*>(row.step) += 1.0f;
  }
}

// ---- Launchers

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

const char* launch_norm(const NormArgs& args, int device, void* stream) {
  switch (args.grad_dtype) {
    case kFloat32:
      return launch<norm_kernel<float>>(args, args.table, device, stream);
    case kBFloat16:
      return launch<norm_kernel<__nv_bfloat16>>(args, args.table, device, stream);
    case kFloat16:
      return launch<norm_kernel<__half>>(args, args.table, device, stream);
    case kFloat64:
      return launch<norm_kernel<double>>(args, args.table, device, stream);
  }
  return "not built for this dtype";
}

const char* launch_update(const UpdateArgs& args, bool hypers_on_host, int device, void* stream) {
  UpdateParams params{args, {}};
  if (hypers_on_host) {
    if (args.n_hypers > kMaxInlineHypers) return "too many hypers for a table on the host";
    for (int64_t i = 0; i < args.n_hypers; ++i) params.hypers[i] = args.hypers[i];
    params.args.hypers = nullptr;
  }
#define CASE(P, G, S)                                                                                     \
  if (args.param_dtype == P && args.grad_dtype == G && args.state_dtype == S) {                           \
    return launch<update_kernel<Storage<P>, Storage<G>, Storage<S>>>(params, args.table, device, stream); \
  }
  FUSED_ADAMW_FOR_EACH_DTYPES(CASE)
#undef CASE
  return "not built for these dtypes";
}

const char* cuda_version() { return STRING(__CUDACC_VER_MAJOR__) "." STRING(__CUDACC_VER_MINOR__); }

const char* cuda_archs() { return FUSED_ADAMW_CUDA_ARCHS; }

}  // namespace fused_adamw
