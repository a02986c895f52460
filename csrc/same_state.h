// What Python asks at every step about the optimizer's state, with its thousands of tensors: does it still
// hold the same objects? The stable part of Python's C API; no torch.
#pragma once

#include <Python.h>

namespace fused_adamw {

// same_state(state, snapshot) -> bool
//
// Walks `state`, a dict of dicts, in its order: each key, then the values of its dict. True if these are the
// objects of the tuple `snapshot`, where None stands for any object. Compares identities, calls nothing and
// takes no reference, so that the objects themselves are not touched.
PyObject* same_state(PyObject* module, PyObject* const* args, Py_ssize_t n_args);

}  // namespace fused_adamw
