// Checks on a GPU that FastMath rounds as IEEE 754 says: the roots of all floats, and quotients of all
// divisors' mantissas by a share of the dividends' ones. A power of two in front changes no rounding inside
// FastMath's range, so mantissas are what there is to check; edges of the range are checked apart.
//
//   nvcc -std=c++17 -O3 -arch=native gpu.cu -o rounding && ./rounding [STRIDE]
//
// Every STRIDE-th dividend is taken (default 4099); 1 takes all 2^46 pairs.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#include "rounding.h"

__device__ void add(const Counts& counts, Counts* total) {
  atomicAdd(&total->wrong, counts.wrong);
  atomicAdd(&total->repeated, counts.repeated);
  atomicAdd(&total->all, counts.all);
}

__global__ void roots(Counts* total) {
  Counts counts{};
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t bits = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; bits < 1ull << 32; bits += step) {
    check_root(fused_adamw::as_float(static_cast<uint32_t>(bits)), &counts);
  }
  add(counts, total);
}

__global__ void quotients(uint32_t stride, Counts* total) {
  Counts counts{};
  for (uint32_t y = blockIdx.x * blockDim.x + threadIdx.x; y < 1u << 23; y += gridDim.x * blockDim.x) {
    for (uint32_t x = y % stride; x < 1u << 23; x += stride)
      check_quotient(number(x, 0), number(y, 0), &counts);
  }
  add(counts, total);
}

// Every pair of exponents, signs included, with mantissas drawn by a hash.
__global__ void exponents(Counts* total) {
  Counts counts{};
  const uint32_t x_exponent = blockIdx.x % 512, y_exponent = blockIdx.x / 512;
  uint32_t state = blockIdx.x * blockDim.x + threadIdx.x;
  for (int i = 0; i < 16; ++i) {
    state = state * 747796405u + 2891336453u;
    const uint32_t x = (state >> 9) * (i > 0), y = (state * 2654435769u >> 9) * (i > 1);
    check_quotient(fused_adamw::as_float(x_exponent << 23 | x), fused_adamw::as_float(y_exponent << 23 | y),
                   &counts);
  }
  add(counts, total);
}

int main(int argc, char** argv) {
  const uint32_t stride = argc > 1 ? static_cast<uint32_t>(std::atoi(argv[1])) : 4099;
  Counts* totals;
  if (cudaMallocManaged(&totals, 3 * sizeof(Counts))) return std::puts("no memory on a GPU"), 2;
  for (int i = 0; i < 3; ++i) totals[i] = {};
  roots<<<4096, 256>>>(totals);
  quotients<<<4096, 256>>>(stride, totals + 1);
  exponents<<<512 * 512, 64>>>(totals + 2);
  if (const cudaError_t error = cudaDeviceSynchronize()) return std::puts(cudaGetErrorString(error)), 2;
  const char* names[] = {"roots", "quotients", "exponents"};
  bool wrong = false;
  for (int i = 0; i < 3; ++i) {
    std::printf("%-9s %llu checked, %llu left to the slow path, %llu wrong\n", names[i], totals[i].all,
                totals[i].repeated, totals[i].wrong);
    wrong |= totals[i].wrong > 0;
  }
  return wrong;
}
