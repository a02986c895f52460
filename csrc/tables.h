// The plain structs that every kernel reads: no torch, no CUDA.
//
// A step is data, not control flow. Python fills these tables (fused_adamw/tables.py mirrors the layouts and
// a test holds the two together); the kernels of csrc/ and of fused_adamw/backends/triton/ walk them.
#pragma once

#include <cstdint>

namespace fused_adamw {

// Where one tensor is kept: its values and, if its format needs one, what it keeps beside them. 0: nowhere.
struct Field {
  uint64_t values;
  uint64_t side;
};

// Where one parameter lives. Addresses are of the first element; all tensors of a row are dense and share one
// memory layout, so a flat index names the same element in each. 128 bytes: two cache lines, fetched as a
// pair.
struct Row {
  Field param;
  Field exp_avg;
  Field exp_avg_sq;
  Field max_exp_avg_sq;  // nowhere: the group does not use amsgrad
  Field average;         // nowhere: none is kept
  uint64_t step;         // one float32: updates made so far
  int64_t numel;
  int32_t hyper;    // index into the Hyper table
  int32_t slot;     // index into the table of gradients
  int64_t ordinal;  // the parameter's number in the whole model, which its noise depends on
  // Where the elements of a shard lie in the whole tensor: element i is number
  // offset + i / local_columns * columns + i % local_columns there. Of a whole tensor: 0, 1, 1. Where moments
  // are codes, local_columns is the length of the rows that are cut into blocks.
  int64_t offset;
  uint32_t local_columns;
  uint32_t columns;
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
  double weight_decay;  // parameters shrink by weight_decay * lr^decay_power
  int32_t decay_power;  // 0, 1 or 2
  int32_t cautious;     // not 0: they do so only where the update shrinks them too
  int32_t nesterov;     // not 0: the momentum looks one step ahead, as NAdam's does
  int32_t grad_sign;    // -1 under maximize, else 1
  uint64_t lr_address;  // one float32 on the device that overrides lr; 0: none
};

// What is known only when the step runs. Pointers are to the memory of the device that runs the kernel. Eight
// bytes each, so that Python can fill it as it fills the tables.
struct StepInputs {
  const double* sums;       // parts of the sum of squares of all gradients; null: no norm, no clipping
  int64_t n_sums;           // number of parts
  double max_grad_norm;     // read where sums is given
  const float* grad_scale;  // loss scale that the gradients still carry; null: 1
  const float* found_inf;   // not 0: skip the step; null: 0
  int64_t skip_nonfinite;   // not 0: skip the step where the norm is not finite
  uint64_t seed;            // of the noise of stochastic formats
  double* status;           // written: {gradient norm, += 1 if the step was skipped}
};

// Numbers of the formats of formats.h.
enum FormatCode : int64_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat64 = 3,
  kStochasticBFloat16 = 4,
  kSplitBFloat16 = 5,
  kSignedRoot = 6,
  kUnsignedRoot = 7,
};

// How the tensors of one launch are kept. The maximum of exp_avg_sq is kept as exp_avg is.
struct FormatCodes {
  FormatCode param, grad, exp_avg, exp_avg_sq;
};

struct Table {
  const Row* rows;
  int64_t n_rows;
  const uint64_t* grads;  // address of each slot's gradient; 0: none this step, its row is left alone
  const Chunk* chunks;
  int64_t n_chunks;
  int64_t chunk_size;
};

struct UpdateArgs {
  Table table;
  const Hyper* hypers;
  int64_t n_hypers;
  FormatCodes formats;
  StepInputs inputs;
  uint32_t* ticket;  // CUDA only: counts finished blocks; 0 before and after
};

struct NormArgs {
  Table table;
  FormatCode grad;
  double* partials;  // one per chunk
  double* sum;       // written: the sum of squares over the table
  uint32_t* ticket;  // CUDA only: counts finished blocks; 0 before and after
};

}  // namespace fused_adamw
