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
  double weight_decay;  // parameters shrink by weight_decay * lr^decay_power, with 0^0 = 0
  int32_t decay_power;  // 0, 1 or 2
  int32_t cautious;     // not 0: they do so only where the update shrinks them too
  int32_t nesterov;     // not 0: the momentum looks one step ahead, as NAdam's does
  int32_t grad_sign;    // -1 under maximize, else 1
  uint64_t lr_address;  // one float32 on the device that overrides lr; 0: none
};

// How the average of the parameters follows them: see average.h.
struct Averaging {
  double decay;        // of the average: what is kept of it when it moves
  int64_t warmup;      // enum Warmup: how decay is reached
  int64_t start_step;  // the average is the parameter itself until so many updates have been made
  int64_t every;       // it then moves at every so many updates
};

enum Warmup : int64_t { kNoWarmup = 0, kTimmWarmup = 1, kDiffusersWarmup = 2 };

// When a gradient norm, or a loss, is a spike: see outcome.h.
struct SpikeOptions {
  double sigmas;   // above the mean by more than so many deviations ...
  int64_t window;  // ... of so many accepted ones; 0: nothing is a spike
  int64_t warmup;  // of which so many have to be known before any is
  int64_t clips;   // not 0: clip gradients to the limit; 0: skip the step
};

// What became of a step.
enum Outcome : int64_t {
  kStepped = 0,
  kClippedSpike = 1,  // stepped, with gradients clipped to the limit
  kOverflow = 2,      // this and the next ones skipped: found_inf was set
  kNonfinite = 3,     // the norm or the loss was not finite
  kSpike = 4,         // the norm was a spike
  kLossSpike = 5,     // the loss was
};
constexpr int64_t kOutcomes = 6;

// What a step leaves to be read, in doubles. Every launch of a step writes its own, all of them the same.
struct Status {
  double grad_norm;
  double loss_scale;         // that the gradients carried
  double outcome;            // enum Outcome
  double counts[kOutcomes];  // steps so far by outcome
};

// Follows the status where spikes are looked for; then a Series for norms and one for losses.
constexpr int64_t kRefusedNorms = 8;
struct SpikeHistory {
  double streak;                  // steps skipped in a row, other than by found_inf
  double refused[kRefusedNorms];  // norms of the latest ones, a ring
};

// Follows the history twice, each time with as many accepted values as the window has.
struct Series {
  double limit;  // what the next one must not exceed, once `accepted` reaches the warmup
  double accepted;
  double values[1];  // a ring
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
  Status* status;           // written; read and written with all that follows it where spikes are looked for
  const double* loss;       // tested as the norm is; null: not
  SpikeOptions spikes;
  Averaging averaging;  // of the rows that have an average
};

// Numbers of the formats of formats.h.
enum FormatCode : int64_t {
  kNoFormat = -1,
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
  FormatCode average;  // kNoFormat: no row has one
};

// What the update finds out about a chunk, where it is asked to: see stats.h.
struct ChunkStats {
  double grad_squares;    // of the gradient as it is stored; not said where the norm pass has found it
  double grad_max;        // its largest magnitude; NaN if there is one
  double update_squares;  // of what the step added to the parameter, decay included
  double param_squares;   // of the parameter after it
  double lost_updates;    // how many of those additions rounding to bfloat16 would lose
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
  ChunkStats* stats;  // one per chunk, written for rows that are stepped; null: not asked for
  uint32_t* ticket;   // CUDA only: counts finished blocks; 0 before and after
};

struct NormArgs {
  Table table;
  FormatCode grad;
  double* partials;  // one per chunk
  double* sum;       // written: the sum of squares over the table
  uint32_t* ticket;  // CUDA only: counts finished blocks; 0 before and after
};

}  // namespace fused_adamw
