#include "guard.h"

#include <ATen/dlpack.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "dispatch_keys.h"

namespace fused_adamw {
namespace {

constexpr char kCapsule[] = "fused_adamw.guard";
// In place of the description of a gradient where there must not be one: like nothing.
constexpr int64_t kNoGrad = -1;
// Numbers of a description beside two for each dimension.
constexpr int64_t kFixedNumbers = 4;
// How many objects ahead a check prefetches.
constexpr int64_t kAhead = 12;

// Attributes that a check reads.
struct Names {
  PyObject* const grad = checked(PyUnicode_InternFromString("grad"));
  PyObject* const local_tensor = checked(PyUnicode_InternFromString("_local_tensor"));
  PyObject* const mesh = checked(PyUnicode_InternFromString("mesh"));
  PyObject* const placements = checked(PyUnicode_InternFromString("placements"));
  PyObject* const shape = checked(PyUnicode_InternFromString("shape"));
  PyObject* const spec = checked(PyUnicode_InternFromString("_spec"));
  // What a step reads of a parameter's state.
  const std::array<PyObject*, 4> state{checked(PyUnicode_InternFromString("step")),
                                       checked(PyUnicode_InternFromString("exp_avg")),
                                       checked(PyUnicode_InternFromString("exp_avg_sq")),
                                       checked(PyUnicode_InternFromString("max_exp_avg_sq"))};
};

const Names& names() {
  static const Names all;
  return all;
}

bool is_empty(const DLTensor& t) { return std::find(t.shape, t.shape + t.ndim, 0) != t.shape + t.ndim; }

int64_t address_of(const DLTensor& t) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data) + t.byte_offset);
}

// Passes what kernels rely on beside a tensor's address to `take`, one by one, until that returns false.
// The first number, of dimensions, determines how many follow.
template <typename F>
bool describe(const DLTensor& t, int64_t keys, const F& take) {
  bool going = take(t.ndim) && take(t.dtype.code | t.dtype.bits << 8 | int64_t{t.dtype.lanes} << 16) &&
               take(t.device.device_type | int64_t{t.device.device_id} << 32) && take(keys);
  for (int32_t i = 0; going && i < t.ndim; ++i) {
    going = take(t.shape[i]) && take(t.shape[i] > 1 ? t.strides[i] : 0);  // of size 1: not used
  }
  return going;
}

std::vector<int64_t> integers(PyObject* tuple) {
  std::vector<int64_t> found;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i) found.push_back(PyLong_AsLongLong(item(tuple, i)));
  if (PyErr_Occurred()) throw PythonError();
  return found;
}

// A strong reference, or nothing.
struct Decref {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};
using Kept = std::unique_ptr<PyObject, Decref>;

Kept keep(PyObject* object) {
  Py_IncRef(object);
  return Kept(object);
}

struct Object {
  PyObject* object = nullptr;
  Kept name;  // under which the state has it
  PyTypeObject* type = nullptr;
  PyTypeObject* local_type = nullptr;
  Kept spec;  // where a DTensor is: its mesh and placements; nothing for other tensors
  // Where the tensor and its storage were, which a check reaches through the object: hints to prefetch.
  const char* behind[2] = {};
};

// Calls f with the tensor, or with the local tensor of a DTensor.
template <typename F>
bool with_local(PyObject* tensor, bool is_dtensor, const F& f) {
  if (!is_dtensor) return f(tensor);
  return f(Owned(PyObject_GetAttr(tensor, names().local_tensor)).get());
}

// What was recorded.
class Guard {
 public:
  Guard(PyObject* tensor_type, PyObject* params, PyObject* grads, PyObject* state, PyObject* probes)
      : tensor_type(reinterpret_cast<PyTypeObject*>(tensor_type)) {
    const Owned capsule(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
    const auto* const api = static_cast<const DLPackExchangeAPI*>(
        checked(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api")));
    to_dlpack_ = api->dltensor_from_py_object_no_sync;
    if (api->header.version.major != DLPACK_MAJOR_VERSION || !to_dlpack_) {
      PyErr_SetString(PyExc_NotImplementedError, "another version of DLPack");
      throw PythonError();
    }
    keys_.locate(to_dlpack(item(item(probes, 0), 0)), probes);
    for (Py_ssize_t i = 0; i < PyTuple_Size(state); ++i) {
      PyObject* const of_param = item(state, i);
      this->state.emplace_back();
      this->state.back().object = item(of_param, 0);
      for (Py_ssize_t j = 1; j + 1 < PyTuple_Size(of_param); j += 2) {
        this->state.push_back(record(item(of_param, j + 1)));
        this->state.back().name = keep(item(of_param, j));
      }
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(params); ++i) {
      this->params.push_back(record(item(params, i)));
      record_grad(item(grads, i));
      own_.push_back(item(params, i));
    }
    std::sort(own_.begin(), own_.end());
    if (PyErr_Occurred()) throw PythonError();
  }

  DLTensor to_dlpack(PyObject* tensor) const {
    DLTensor t;
    if (to_dlpack_(tensor, &t) != 0) throw PythonError();
    return t;
  }
  int64_t keys(PyObject* tensor, const DLTensor& t) const { return keys_(tensor, t); }

  // Whether the state of this object is the optimizer's own.
  bool is_param(PyObject* object) const { return std::binary_search(own_.begin(), own_.end(), object); }

  PyTypeObject* const tensor_type;
  // In the order of a check. Of each parameter in the state itself, then what belongs to it.
  std::vector<Object> state, params;
  // Address and description of each tensor of the state and each parameter; after a parameter its gradient's
  // description.
  std::vector<int64_t> numbers;

 private:
  Object record(PyObject* tensor) {
    Object object;
    object.object = tensor;
    object.type = Py_TYPE(tensor);
    if (PyObject_HasAttr(tensor, names().local_tensor) == 1) {
      object.spec.reset(checked(PyObject_GetAttr(tensor, names().spec)));
    }
    with_local(tensor, object.spec != nullptr, [&](PyObject* local) {
      const DLTensor t = to_dlpack(local);
      if (!keys_.knows(local, t)) {
        PyErr_SetString(PyExc_NotImplementedError, "a tensor of another layout");
        throw PythonError();
      }
      object.local_type = Py_TYPE(local);
      numbers.push_back(address_of(t));
      object.behind[0] = cdata_of(local);
      object.behind[1] = cdata_of(Owned(PyObject_CallMethod(local, "untyped_storage", nullptr)).get());
      return record_description(t, keys(local, t));
    });
    return object;
  }

  void record_grad(PyObject* expected) {
    if (expected == Py_None) return numbers.push_back(kNoGrad);
    DLTensor t = to_dlpack(item(expected, 0));
    std::vector<int64_t> shape = integers(item(expected, 1)), strides = integers(item(expected, 2));
    t.ndim = static_cast<int32_t>(shape.size());
    t.shape = shape.data();
    t.strides = strides.data();
    record_description(t, KeyReader::as_keys(item(expected, 3)));
  }

  bool record_description(const DLTensor& t, int64_t keys) {
    return describe(t, keys, [this](int64_t number) { return numbers.push_back(number), true; });
  }

  DLPackDLTensorFromPyObjectNoSync to_dlpack_;
  KeyReader keys_;
  std::vector<PyObject*> own_;  // the parameters, sorted
};

// One comparison with what was recorded.
class Check {
 public:
  explicit Check(const Guard& guard)
      : guard_(guard),
        number_(guard.numbers.data()),
        grads_(PyList_New(static_cast<Py_ssize_t>(guard.params.size()))) {
    addresses_.reserve(guard.params.size());
  }

  bool is_same_state(PyObject* state) {
    PyObject *param, *of_param, *name, *value;
    size_t n = 0;
    const std::vector<Object>& known = guard_.state;
    for (Py_ssize_t i = 0; PyDict_Next(state, &i, &param, &of_param);) {
      if (n == known.size() || param != known[n].object) {
        if (guard_.is_param(param)) return false;
        continue;  // the user's
      }
      if (!PyDict_Check(of_param)) return false;
      ++n;
      for (Py_ssize_t j = 0; PyDict_Next(of_param, &j, &name, &value);) {
        if (n < known.size() && name == known[n].name.get()) {
          if (!is_unmoved(value, known, n++)) return false;
        } else if (is_read(name)) {
          return false;
        }
      }
    }
    return n == known.size();
  }

  bool finds_grads(PyObject* groups) {
    size_t n = 0;
    const std::vector<Object>& known = guard_.params;
    for (Py_ssize_t i = 0; i < PyList_Size(groups); ++i) {
      PyObject* const params = PyList_GetItem(groups, i);
      if (!PyList_Check(params)) return false;
      for (Py_ssize_t j = 0; j < PyList_Size(params); ++j, ++n) {
        PyObject* const param = PyList_GetItem(params, j);
        if (n == known.size() || param != known[n].object || !is_unmoved(param, known, n)) return false;
        if (!finds_grad(known[n])) return false;
      }
    }
    return n == known.size();
  }

  // The gradients found: (bytes, list), and the list of what is stepped.
  PyObject* result() {
    const Owned stepped(PyList_New(static_cast<Py_ssize_t>(stepped_.size())));
    for (size_t i = 0; i < stepped_.size(); ++i)
      PyList_SetItem(stepped.get(), static_cast<Py_ssize_t>(i), stepped_[i].release());
    const Owned bytes(
        PyBytes_FromStringAndSize(reinterpret_cast<const char*>(addresses_.data()),
                                  static_cast<Py_ssize_t>(addresses_.size() * sizeof(int64_t))));
    return checked(PyTuple_Pack(3, bytes.get(), grads_.get(), stepped.get()));
  }

 private:
  // Whether a step reads what a parameter's state has under a name.
  static bool is_read(PyObject* name) {
    const auto& read = names().state;
    return std::any_of(read.begin(), read.end(), [name](PyObject* other) {
      if (name == other) return true;
      return PyUnicode_Check(name) && PyObject_RichCompareBool(name, other, Py_EQ) == 1;
    });
  }

  // Whether the tensor has the address and description of the n-th recorded one. It may be another object.
  bool is_unmoved(PyObject* tensor, const std::vector<Object>& known, size_t n) {
    if (n + kAhead < known.size()) prefetch(known[n + kAhead]);
    if (Py_TYPE(tensor) != known[n].type) return false;
    PyObject* const spec = known[n].spec.get();
    if (spec && !is_placed(tensor, spec)) return false;
    return with_local(tensor, spec, [&](PyObject* local) {
      if (Py_TYPE(local) != known[n].local_type) return false;
      const DLTensor t = guard_.to_dlpack(local);
      return address_of(t) == *number_++ && is_as_expected(local, t);
    });
  }

  // In training, none of this is in the caches, and each object is reached through a pointer in another.
  // Forced inline: GCC would otherwise see a function without effects and drop the call.
  __attribute__((always_inline)) static void prefetch(const Object& object) {
    __builtin_prefetch(object.object);
    for (const char* const behind : object.behind)
      for (int offset = 0; offset < 192; offset += 64) __builtin_prefetch(behind + offset);
  }

  bool finds_grad(const Object& param) {
    const Owned grad(PyObject_GetAttr(param.object, names().grad));
    if (grad.get() == Py_None) {
      number_ += *number_ == kNoGrad ? 1 : kFixedNumbers + 2 * *number_;
      return add(0, grad.get());
    }
    PyObject* const spec = param.spec.get();
    if (spec && !is_placed(grad.get(), spec)) return false;
    return with_local(grad.get(), spec, [&](PyObject* local) {
      if (Py_TYPE(local) != guard_.tensor_type) return false;
      const DLTensor t = guard_.to_dlpack(local);
      if (!is_as_expected(local, t)) return false;
      const int64_t address = address_of(t);
      if (!address && !is_empty(t)) return false;  // its memory was taken away
      is_stepped(param.object);
      if (spec) with_local(param.object, true, [this](PyObject* of_param) { return is_stepped(of_param); });
      return add(address ? address : 1, local);
    });
  }

  bool is_stepped(PyObject* tensor) { return stepped_.push_back(keep(tensor)), true; }

  bool add(int64_t address, PyObject* grad) {
    Py_IncRef(grad);  // the list steals it
    PyList_SetItem(grads_.get(), static_cast<Py_ssize_t>(addresses_.size()), grad);
    return addresses_.push_back(address), true;
  }

  // Whether a DTensor has this mesh, these placements and this shape. Those of FSDP2 share one object that
  // says so.
  static bool is_placed(PyObject* tensor, PyObject* expected) {
    const Owned spec(PyObject_GetAttr(tensor, names().spec));
    if (spec.get() == expected) return true;
    const auto has_equal = [&](PyObject* name) {
      const Owned a(PyObject_GetAttr(spec.get(), name)), b(PyObject_GetAttr(expected, name));
      const int is_equal = PyObject_RichCompareBool(a.get(), b.get(), Py_EQ);
      if (is_equal < 0) throw PythonError();
      return is_equal == 1;
    };
    return has_equal(names().mesh) && has_equal(names().placements) && has_equal(names().shape);
  }

  bool is_as_expected(PyObject* tensor, const DLTensor& t) {
    return describe(t, guard_.keys(tensor, t), [this](int64_t number) { return number == *number_++; });
  }

  const Guard& guard_;
  const int64_t* number_;  // the next one to compare
  std::vector<int64_t> addresses_;
  const Owned grads_;
  std::vector<Kept> stepped_;
};

void destroy(PyObject* capsule) { delete static_cast<Guard*>(PyCapsule_GetPointer(capsule, kCapsule)); }

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

}  // namespace

PyObject* make_guard(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 5) return PyErr_Format(PyExc_TypeError, "make_guard expects 5 arguments, got %zd", n_args);
  return guarded([args] {
    auto made = std::make_unique<Guard>(args[0], args[1], args[2], args[3], args[4]);
    PyObject* const capsule = checked(PyCapsule_New(made.get(), kCapsule, &destroy));
    made.release();
    return capsule;
  });
}

PyObject* check_guard(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 3 || !PyList_Check(args[1]))
    return PyErr_Format(PyExc_TypeError, "check_guard expects a capsule, a list and a mapping");
  const auto* const guard = static_cast<const Guard*>(PyCapsule_GetPointer(args[0], kCapsule));
  if (!guard) return nullptr;
  return guarded([args, guard]() -> PyObject* {
    Check check(*guard);
    try {
      if (!PyDict_Check(args[2]) || !check.is_same_state(args[2]) || !check.finds_grads(args[1]))
        Py_RETURN_NONE;
    } catch (const PythonError&) {
      if (!PyErr_ExceptionMatches(PyExc_Exception)) throw;  // the user's interrupt
      PyErr_Clear();                                        // it cannot be checked
      Py_RETURN_NONE;
    }
    return check.result();
  });
}

}  // namespace fused_adamw
