// The plain structs that every kernel reads: no torch, no CUDA.
//
// A step is data, not control flow. Python fills these tables (fused_adamw/tables.py mirrors the layouts and
// a test holds the two together); the kernels of csrc/ and of fused_adamw/backends/triton.py walk them.
#pragma once

#include <cstdint>

namespace fused_adamw {

// Where one parameter lives. Addresses are of the first element; all tensors of a row are dense and share one
// memory layout, so a flat index names the same element in each. 64 bytes.
struct Row {
  uint64_t param;
  uint64_t grad;  // 0: no gradient this step, the row is left alone
  uint64_t exp_avg;
  uint64_t exp_avg_sq;
  uint64_t max_exp_avg_sq;  // 0: the group does not use amsgrad
  uint64_t step;            // one float32: updates made so far
  int64_t numel;
  int64_t hyper;  // index into the Hyper table
};

// The unit of work everywhere (CPU task, CUDA block iteration, Triton program): elements
// [index * chunk_size, (index + 1) * chunk_size) of a row, cut at its end.
struct Chunk {
  int32_t row;
  int32_t index;
};

// How one parameter group is stepped.
struct Hyper {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double grad_sign;     // -1 under maximize, else 1
  uint64_t lr_address;  // one float32 on the device that overrides lr; 0: none
};

// What is known only when the step runs. Pointers are to the memory of the device that runs the kernel.
struct StepInputs {
  const double* sums;       // parts of the sum of squares of all gradients; null: no norm, no clipping
  int64_t n_sums;           // number of parts
  double max_grad_norm;     // read where sums is given
  const float* grad_scale;  // loss scale that the gradients still carry; null: 1
  const float* found_inf;   // not 0: skip the step; null: 0
  bool skip_nonfinite;      // skip the step where the norm is not finite
  double* status;           // written: {gradient norm, += 1 if the step was skipped}
};

// Numbers of the formats of formats.h.
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct Table {
  const Row* rows;
  int64_t n_rows;
  const Chunk* chunks;
  int64_t n_chunks;
  int64_t chunk_size;
};

struct UpdateArgs {
  Table table;
  const Hyper* hypers;
  int64_t n_hypers;
  DType param_dtype, grad_dtype, state_dtype;
  StepInputs inputs;
  uint32_t* ticket;  // CUDA only: counts finished blocks; 0 before and after
};

struct NormArgs {
  Table table;
  DType grad_dtype;
  double* partials;  // one per chunk
  double* sum;       // written: the sum of squares over the table
  uint32_t* ticket;  // CUDA only: counts finished blocks; 0 before and after
};

}  // namespace fused_adamw
