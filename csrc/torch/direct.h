// The gradient of a parameter, and its version counter, without Python objects: torch makes one for each new
// gradient that Python looks at. By functions of torch's that are looked up by name: where a torch has none
// of that name, there is the way through Python.
#pragma once

namespace fused_adamw {

// A tensor of torch: where an at::Tensor is.
using TensorPlace = const void* const*;

// Whether this torch has what the functions below take.
bool has_direct();

// Where the gradient of a tensor is kept. tensor: at its start, what an at::Tensor points to.
TensorPlace grad_of(const void* tensor);

// A reference of one's own to a tensor, to be given back to `release`.
void* hold(TensorPlace tensor);
void release(void* held);

// Counts a change of a tensor in place. Throws what torch throws.
void bump_version(const void* tensor);

}  // namespace fused_adamw
