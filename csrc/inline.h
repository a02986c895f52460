// How functions are declared that several translation units share.
#pragma once

// Forced inline: the CPU kernels are compiled once per instruction set, and a copy that the linker shared
// between them could run instructions that the machine lacks.
#define ADAMW_HOST_FN static inline __attribute__((always_inline))

#if defined(__CUDACC__)
#define ADAMW_FN static __host__ __device__ __forceinline__
#else
#define ADAMW_FN ADAMW_HOST_FN
#endif
