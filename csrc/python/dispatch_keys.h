// Reads the dispatch keys of tensors: the bits by which torch tells a conjugate or negated view, or a tensor
// made in inference mode, from a plain one of the same address. They lie in the tensor, and no C interface
// reads them; asking Python for them would double the time of a check. Where they lie is found by looking for
// known ones.
#pragma once

#include <ATen/dlpack.h>
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <exception>

namespace fused_adamw {

// Thrown where a Python exception is set.
struct PythonError : std::exception {};

template <typename T>
T* checked(T* result) {
  if (!result) throw PythonError();
  return result;
}

// A new reference, given back at the end.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(checked(object)) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_DecRef(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* const object_;
};

inline PyObject* item(PyObject* tuple, Py_ssize_t i) { return checked(PyTuple_GetItem(tuple, i)); }

inline const char* cdata_of(PyObject* tensor) {
  static PyObject* const name = checked(PyUnicode_InternFromString("_cdata"));
  const Owned address(PyObject_GetAttr(tensor, name));
  return static_cast<const char*>(checked(PyLong_AsVoidPtr(address.get())));
}

class KeyReader {
 public:
  // probes: tuple of (tensor, its keys), of which no two tensors have the same keys and sizes.
  void locate(const DLTensor& first, PyObject* probes) {
    sizes_ = reinterpret_cast<const char*>(first.shape) - cdata_of(item(item(probes, 0), 0));
    for (keys_ = 0; keys_ < kSearched; keys_ += sizeof(int64_t)) {
      bool found = true;
      for (Py_ssize_t i = 0; found && i < PyTuple_Size(probes); ++i) {
        PyObject* const probe = item(probes, i);
        found = load(cdata_of(item(probe, 0)) + keys_) == as_keys(item(probe, 1));
      }
      if (found) return;
    }
    PyErr_SetString(PyExc_NotImplementedError, "another layout of tensors");
    throw PythonError();
  }

  int64_t operator()(PyObject* tensor, const DLTensor& t) const {
    const char* const start =
        t.ndim > kInlineDims ? cdata_of(tensor) : reinterpret_cast<const char*>(t.shape) - sizes_;
    return load(start + keys_);
  }

  // Whether a tensor is where its sizes are expected.
  bool knows(PyObject* tensor, const DLTensor& t) const {
    return t.ndim > kInlineDims || reinterpret_cast<const char*>(t.shape) - sizes_ == cdata_of(tensor);
  }

  static int64_t as_keys(PyObject* number) {
    const int64_t keys = PyLong_AsLongLong(number);
    if (PyErr_Occurred()) throw PythonError();
    return keys;
  }

 private:
  // Up to so many dimensions, torch keeps a tensor's sizes in the tensor itself.
  static constexpr int32_t kInlineDims = 5;
  // Within how many bytes of a tensor its dispatch keys are looked for.
  static constexpr int64_t kSearched = 256;

  static int64_t load(const char* from) {
    int64_t keys;
    std::memcpy(&keys, from, sizeof keys);
    return keys;
  }

  int64_t sizes_ = 0, keys_ = 0;  // offsets
};

}  // namespace fused_adamw
