#include "same_state.h"

namespace fused_adamw {
namespace {

class Snapshot {
 public:
  explicit Snapshot(PyObject* objects) : objects_(objects), size_(PyTuple_Size(objects)) {}

  bool next_is(PyObject* object) {
    if (at_ == size_) return false;
    PyObject* const expected = PyTuple_GetItem(objects_, at_++);
    return expected == object || expected == Py_None;
  }
  bool is_at_end() const { return at_ == size_; }

 private:
  PyObject* const objects_;
  const Py_ssize_t size_;
  Py_ssize_t at_ = 0;
};

bool is_same(PyObject* state, Snapshot snapshot) {
  PyObject *param, *of_param, *name, *value;
  for (Py_ssize_t i = 0; PyDict_Next(state, &i, &param, &of_param);) {
    if (!snapshot.next_is(param) || !PyDict_Check(of_param)) return false;
    for (Py_ssize_t j = 0; PyDict_Next(of_param, &j, &name, &value);) {
      if (!snapshot.next_is(value)) return false;
    }
  }
  return snapshot.is_at_end();
}

}  // namespace

PyObject* same_state(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 2 || !PyDict_Check(args[0]) || !PyTuple_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "same_state expects a dict and a tuple");
    return nullptr;
  }
  return PyBool_FromLong(is_same(args[0], Snapshot(args[1])));
}

}  // namespace fused_adamw
