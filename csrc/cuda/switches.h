// Choices between kernels of equal results that only measurements on a GPU can make. Each is set by
// FUSED_ADAMW_NVCC_FLAGS="-DFUSED_ADAMW_FAST_MATH=1 ..." at build time.
#pragma once

// 1: divide and take roots by FastMath, with one slow path for a vector of elements.
#ifndef FUSED_ADAMW_FAST_MATH
#define FUSED_ADAMW_FAST_MATH 0
#endif

// 1: update chunks in the reverse order of the norm, which leaves the last gradients in the L2 cache.
#ifndef FUSED_ADAMW_REVERSE_UPDATE
#define FUSED_ADAMW_REVERSE_UPDATE 0
#endif

// Blocks of the update that a multiprocessor holds at once, for plain layouts; for others, one fewer. Three
// have 48 KB of loads in flight, and a thread of theirs 80 registers, which hold its vectors without
// spilling; of four, 64 KB and 64 registers.
#ifndef FUSED_ADAMW_BLOCKS_PER_PROCESSOR
#define FUSED_ADAMW_BLOCKS_PER_PROCESSOR 3
#endif
