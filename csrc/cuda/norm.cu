// CUDA: sums of squares of gradients. No torch: plain nvcc compiles this file.
#include <cfloat>

#include "kernels.h"
#include "walk.cuh"

namespace fused_adamw {
namespace {

// One thread's share of a sum of squares: a few squares at a time in Sum, then on in double, which keeps
// double arithmetic rare where it is slow. Which elements a thread adds, and in which order, does not depend
// on alignment.
template <typename Sum, typename Format>
__device__ __forceinline__ double thread_sum_of_squares(const typename Format::Stored* g, int n) {
  using G = typename Format::Stored;
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
          x[u].at[k] = j < n ? g[j] : G(0);
        }
      }
    }
    Sum squares[kUnroll] = {};
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const Sum x_k = Format::load(x[u].at[k]);
        squares[u] += x_k * x_k;
      }
    }
    sum += (squares[0] + squares[1]) + (squares[2] + squares[3]);
  }
  return sum;
}

template <typename Format>
__device__ __forceinline__ double sum_of_squares(const typename Format::Stored* g, int n) {
  const double sum = block_sum(thread_sum_of_squares<typename Format::Register, Format>(g, n));
  // A square may have overflowed float32: as on the CPU, the norm is finite wherever the gradients are.
  return sum <= DBL_MAX ? sum : block_sum(thread_sum_of_squares<double, Format>(g, n));
}

template <typename Format>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormArgs args) {
  for (int64_t i = blockIdx.x; i < args.table.n_chunks; i += gridDim.x) {
    const Chunk chunk = args.table.chunks[i];
    const Row& row = args.table.rows[chunk.row];
    const Span span = span_of(args.table, row, chunk);
    const uint64_t grad = args.table.grads[row.slot];
    const auto g = reinterpret_cast<const typename Format::Stored*>(grad) + span.start;
    const double sum = grad ? sum_of_squares<Format>(g, span.n) : 0.0;
    if (threadIdx.x == 0) args.partials[i] = sum;
  }
  if (!last_block(args.ticket)) return;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < args.table.n_chunks; i += kThreads) sum += __ldcg(args.partials + i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) *args.sum = sum;
}

}  // namespace

const char* launch_norm(const NormArgs& args, int device, void* stream) {
  const char* failure = "not built for this dtype";
  PlainFormats::visit(args.grad, [&](auto format) {
    failure = launch<norm_kernel<decltype(format)>>(args, args.table, device, stream);
  });
  return failure;
}

}  // namespace fused_adamw
