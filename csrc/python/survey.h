// Where many tensors are, and which of them are alike: what a plan is built from. Written as guard.h.
#pragma once

#include <Python.h>

namespace fused_adamw {

// survey(tensor_type, tensors, probes) -> (bytes, bytes)
//
//   tensor_type  torch.Tensor
//   tensors      list of tensors, none of them a DTensor
//   probes       tuple of (tensor, its dispatch keys), as for make_guard
//
// Returns the address of each tensor, and the position of the first one in the list with its type, dtype,
// device, shape, strides and dispatch keys, an int64 each. Raises if DLPack cannot describe a tensor, or
// dispatch keys are not found.
PyObject* survey(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

}  // namespace fused_adamw
