// The guard of a plan: before kernels may follow the addresses in its tables, does the optimizer still hold
// the same parameters, are they and their state where and as they were, and where are the gradients? Written
// against Python's stable C API, and DLPack's for what is behind a tensor; no torch.
#pragma once

#include <Python.h>

namespace fused_adamw {

// make_guard(tensor_type, params, grads, state, read, probes) -> capsule
//
//   tensor_type  torch.Tensor
//   params       tuple of the parameters of all groups
//   grads        tuple of tuples, one for each parameter: a tensor with the dtype and device of its gradient,
//                the gradient's shape, its strides, its dispatch keys; or None where there must not be a
//                gradient
//   state        tuple of tuples, one for each parameter in the optimizer's state: the parameter, then name
//                and tensor of what a step reads
//   read         tuple of the names of all that a step may read
//   probes       tuple of tuples: a tensor and its dispatch keys, different ones
//
// Records where and as what these tensors are now; of a DTensor, its local tensor and how it is placed. The
// capsule keeps no tensor alive: its owner must not use it once a parameter has died, as parameters are known
// by their identity. Raises if DLPack cannot describe a tensor, or dispatch keys are not found.
PyObject* make_guard(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

// check_guard(capsule, params, state) -> (bytes, list, list, bytes | None) | None
//
//   params       list of the lists of parameters of all groups
//   state        the optimizer's state, a dict; what it has for others than the parameters is not looked at
//
// Returns the addresses of all gradients, an int64 each, 0 where there is none, and the gradients themselves,
// of DTensors their local tensors, None where there is none: as long as the caller holds these, their memory
// stays, whatever other threads do. Then the parameters that have a gradient, and the local tensors of
// DTensors among them. Last, if a tensor is alike but elsewhere, the addresses of all tensors of the state,
// in its order, and of all parameters; else None. None alone if anything else is not as it was, or cannot be
// checked.
PyObject* check_guard(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

// move_guard(capsule, bytes) -> None
//
// Records these addresses, as `check_guard` returned them, for where tensors are.
PyObject* move_guard(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

}  // namespace fused_adamw
