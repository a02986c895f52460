// The guard of a plan: before kernels may follow the addresses in its tables, does the optimizer still hold
// the same parameters, are they and their state where and as they were, and where are the gradients? Written
// against Python's stable C API, and DLPack's for what is behind a tensor; no torch.
#pragma once

#include <Python.h>

namespace fused_adamw {

// make_guard(tensor_type, params, grads, state) -> capsule
//
//   tensor_type  torch.Tensor
//   params       tuple of the parameters of all groups
//   grads        tuple of tuples, one for each parameter: a tensor with the dtype and device of its gradient,
//                the gradient's shape, its strides; or None where there must not be a gradient
//   state        tuple of tuples, one for each parameter in the optimizer's state: the parameter, then name
//                and value of what belongs to it, None for a value that is no tensor
//
// Records where and as what these tensors are now; of a DTensor, its local tensor. The capsule keeps nothing
// alive: its owner must hold the parameters and names, which are known by their identity. Raises if DLPack
// cannot describe a tensor.
PyObject* make_guard(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

// check_guard(capsule, params, state) -> (bytes, list) | None
//
//   params       list of the lists of parameters of all groups
//   state        the optimizer's state; only a dict of dicts can be checked
//
// Returns the addresses of all gradients, an int64 each, 0 where there is none, and the gradients themselves,
// of DTensors their local tensors, None where there is none: as long as the caller holds these, their memory
// stays, whatever other threads do. None if anything is not as it was, or cannot be checked.
PyObject* check_guard(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

}  // namespace fused_adamw
