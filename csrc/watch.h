// What a step asks before kernels may follow the addresses in its tables: does the optimizer still hold the
// same parameters, are they and their state where and as they were, and where are the gradients? Python's
// stable C API, and DLPack's for what is behind a tensor; no torch.
#pragma once

#include <Python.h>

namespace fused_adamw {

// watch(tensor_type, params, grads, state) -> capsule
//
//   tensor_type  torch.Tensor
//   params       tuple of the parameters of all groups
//   grads        tuple of tuples, one for each parameter: a tensor with the dtype and device of its gradient,
//                the gradient's shape, its strides; or None where there must not be a gradient
//   state        tuple of tuples, one for each parameter in the optimizer's state: the parameter, then name
//                and value of what belongs to it, None for a value that is no tensor
//
// Takes down what these tensors are now. Of a DTensor, its local tensor is watched. The capsule keeps nothing
// alive: who holds it holds parameters and names, too, which are known by their identity. Raises if DLPack
// cannot describe a tensor.
PyObject* watch(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

// look(capsule, params, state) -> bytes | None
//
//   params       list of the lists of parameters of all groups
//   state        the optimizer's state; told of a dict of dicts
//
// The addresses of all gradients, int64 each, 0 where there is none; None if anything is not as it was, or
// cannot be told.
PyObject* look(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

}  // namespace fused_adamw
