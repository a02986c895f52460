// The kernels of one instruction set, for tests/kernels/backends.py: what bindings.cpp makes of them, on one
// thread.
#include "../../csrc/cpu/kernels.cpp"
#include "../../csrc/outcome.h"

using namespace fused_adamw;

extern "C" void update(const UpdateArgs* args) {
  const StepScalars scalars = step_scalars(args->inputs);
  record(args->inputs, scalars);
  if (scalars.skip) return;
  update_chunks(*args, scalars.grad_scale, 0, args->table.n_chunks);
  for (int64_t i = 0; i < args->table.n_rows; ++i) {
    const Row& row = args->table.rows[i];
    if (args->table.grads[row.slot]) *reinterpret_cast<float*>(row.step) += 1.0f;
  }
}

extern "C" void norm(const NormArgs* args) {
  norm_chunks(*args, 0, args->table.n_chunks);
  *args->sum = 0.0;
  for (int64_t i = 0; i < args->table.n_chunks; ++i) *args->sum += args->partials[i];
}
