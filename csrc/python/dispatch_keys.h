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
#include <new>
#include <vector>

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

inline Py_ssize_t size_of(PyObject* tuple) {
  const Py_ssize_t size = PyTuple_Size(tuple);
  if (size < 0) throw PythonError();
  return size;
}

inline const char* cdata_of(PyObject* tensor) {
  static PyObject* const name = checked(PyUnicode_InternFromString("_cdata"));
  const Owned address(PyObject_GetAttr(tensor, name));
  return static_cast<const char*>(checked(PyLong_AsVoidPtr(address.get())));
}

// Tells where and how tensors are, through DLPack.
class Dlpack {
 public:
  explicit Dlpack(PyObject* tensor_type) {
    const Owned capsule(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
    const auto* const api = static_cast<const DLPackExchangeAPI*>(
        checked(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api")));
    convert_ = api->dltensor_from_py_object_no_sync;
    if (api->header.version.major != DLPACK_MAJOR_VERSION || !convert_) {
      PyErr_SetString(PyExc_NotImplementedError, "another version of DLPack");
      throw PythonError();
    }
  }

  DLTensor operator()(PyObject* tensor) const {
    DLTensor t;
    if (convert_(tensor, &t) != 0) throw PythonError();
    return t;
  }

 private:
  DLPackDLTensorFromPyObjectNoSync convert_;
};

inline int64_t address_of(const DLTensor& t) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data) + t.byte_offset);
}

// Runs f; what it throws becomes a Python exception.
template <typename F>
PyObject* guarded(const F& f) {
  try {
    return f();
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  return nullptr;
}

inline PyObject* as_bytes(const std::vector<int64_t>& numbers) {
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(numbers.data()),
                                   static_cast<Py_ssize_t>(numbers.size() * sizeof(int64_t)));
}

class KeyReader {
 public:
  // probes: tuple of (tensor, its keys), of which no two tensors have the same keys and sizes.
  void locate(const DLTensor& first, PyObject* probes) {
    sizes_ = reinterpret_cast<const char*>(first.shape) - cdata_of(item(item(probes, 0), 0));
    const bool is_inline = sizes_ > 0 && sizes_ < kMostSizes;
    keys_ = is_inline ? find(probes, [](PyObject* probe) { return as_keys(item(probe, 1)); }) : -1;
    if (keys_ < 0) {
      PyErr_SetString(PyExc_NotImplementedError, "another layout of tensors");
      throw PythonError();
    }
    storage_ = find(probes, [](PyObject* probe) {
      const Owned storage(PyObject_CallMethod(item(probe, 0), "untyped_storage", nullptr));
      return reinterpret_cast<int64_t>(cdata_of(storage.get()));
    });
  }

  int64_t operator()(PyObject* tensor, const DLTensor& t) const { return load(start_of(tensor, t) + keys_); }

  // Where the tensor itself is.
  const char* start_of(PyObject* tensor, const DLTensor& t) const {
    return t.ndim > kInlineDims ? cdata_of(tensor) : reinterpret_cast<const char*>(t.shape) - sizes_;
  }

  // Where its storage is; null if that is not known.
  const char* storage_of(PyObject* tensor, const DLTensor& t) const {
    return storage_ < 0 ? nullptr : reinterpret_cast<const char*>(load(start_of(tensor, t) + storage_));
  }

  // Whether a tensor is where its sizes are expected.
  bool knows(PyObject* tensor, const DLTensor& t) const {
    return t.ndim > kInlineDims || reinterpret_cast<const char*>(t.shape) - sizes_ == cdata_of(tensor);
  }

  // Where in a tensor sizes and keys are.
  int64_t sizes() const { return sizes_; }
  int64_t keys() const { return keys_; }

  static int64_t as_keys(PyObject* number) {
    const int64_t keys = PyLong_AsLongLong(number);
    if (PyErr_Occurred()) throw PythonError();
    return keys;
  }

 private:
  // Up to so many dimensions, torch keeps a tensor's sizes and strides in the tensor itself.
  static constexpr int32_t kInlineDims = 5;
  // Before which byte they begin.
  static constexpr int64_t kMostSizes = 256;

  // The offset at which all probes have what is expected of them; -1 if there is none. A tensor ends with its
  // offset, the number of its elements, its flags and its keys, which follow sizes and strides.
  template <typename F>
  int64_t find(PyObject* probes, const F& expected) const {
    constexpr int64_t word = sizeof(int64_t);
    for (int64_t offset = 0; offset < sizes_ + (2 * kInlineDims + 4) * word; offset += word) {
      bool found = true;
      for (Py_ssize_t i = 0; found && i < size_of(probes); ++i) {
        PyObject* const probe = item(probes, i);
        found = load(cdata_of(item(probe, 0)) + offset) == expected(probe);
      }
      if (found) return offset;
    }
    return -1;
  }

  static int64_t load(const char* from) {
    int64_t keys;
    std::memcpy(&keys, from, sizeof keys);
    return keys;
  }

  int64_t sizes_ = 0, keys_ = 0, storage_ = -1;  // offsets
};

}  // namespace fused_adamw
