// The guard of a plan: before kernels may follow the addresses in its tables, does the optimizer still hold
// the same parameters, are they and their state where and as they were, and where are the gradients? Written
// against Python's stable C API, and DLPack's for what is behind a tensor; what of torch is
// used beside is in ../torch/direct.h.
#pragma once

#include <Python.h>

namespace fused_adamw {

// make_guard(tensor_type, params, grads, state, read, probes, table, by_objects) -> capsule
//
//   tensor_type  torch.Tensor
//   params       tuple of the parameters of all groups
//   grads        tuple of tuples, one for each parameter: a tensor with the dtype and device of its gradient,
//                the gradient's shape, its strides, its dispatch keys, its type; or None where there must not
//                be a gradient
//   state        tuple of tuples, one for each parameter in the optimizer's state: the parameter, then name
//                and tensor of what a step reads
//   read         tuple of the names of all that a step may read
//   probes       tuple of tuples: a tensor and its dispatch keys, different ones
//   table        address of an int64 for each parameter, 0 at first, which the caller keeps alive
//   by_objects   whether the caller needs gradients as Python objects
//
// Records where and as what these tensors are now; of a DTensor, its local tensor and how it is placed. The
// capsule keeps no tensor alive: its owner must not use it once a parameter has died, as parameters are known
// by their identity. Raises if DLPack cannot describe a tensor, or dispatch keys are not found.
PyObject* make_guard(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

// check_guard(capsule, params, state) -> (int, bytes, list | None, list | capsule, bytes | None) | None
//
//   params       list of the lists of parameters of all groups
//   state        the optimizer's state, a dict; what it has for others than the parameters is not looked at
//
// Writes the addresses of all gradients to the table, 0 where there is none, and returns a number that grows
// whenever an address is another one. Then a byte for each parameter: whether it has a gradient; the same
// object while that stays so. Then the gradients, of DTensors their local tensors, None where there is none,
// and the parameters that have one with the local tensors of DTensors among them; or, in their place, None
// and a capsule that holds both without Python objects. As long as the caller holds these, their memory
// stays, whatever other threads do. Last, if a tensor is alike but elsewhere, the addresses of all tensors of
// the state, in its order, and of all parameters; else None. None alone if anything else is not as it was, or
// cannot be checked.
PyObject* check_guard(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

// move_guard(capsule, bytes) -> None
//
// Records these addresses, as `check_guard` returned them, for where tensors are.
PyObject* move_guard(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

// count_changes(capsule) -> None
//
// Tells autograd that the parameters in a capsule of `check_guard` have changed.
PyObject* count_changes(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

}  // namespace fused_adamw
