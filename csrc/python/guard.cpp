#include "guard.h"

#include <ATen/dlpack.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
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
};

const Names& names() {
  static const Names all;
  return all;
}

bool is_empty(const DLTensor& t) { return std::find(t.shape, t.shape + t.ndim, 0) != t.shape + t.ndim; }

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
  Kept grad_type;     // of a parameter: the type of its gradient
  size_t number = 0;  // which of the numbers is its address
  Kept spec;          // where a DTensor is: its mesh and placements; nothing for other tensors
  // Where the tensor and its storage were, which a check reaches through the object: hints to prefetch,
  // looked up by the first check that finds the tensor where it was.
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
  Guard(PyObject* tensor_type, PyObject* params, PyObject* grads, PyObject* state, PyObject* read,
        PyObject* probes)
      : to_dlpack(tensor_type) {
    keys.locate(to_dlpack(item(item(probes, 0), 0)), probes);
    const Py_ssize_t n_state = PyTuple_Size(state), n_params = PyTuple_Size(params);
    if (n_state < 0 || n_params < 0) throw PythonError();
    for (Py_ssize_t i = 0; i < PyTuple_Size(read); ++i) read_.push_back(keep(item(read, i)));
    this->state.reserve(4 * static_cast<size_t>(n_state));
    this->params.reserve(static_cast<size_t>(n_params));
    for (Py_ssize_t i = 0; i < n_state; ++i) {
      PyObject* const of_param = item(state, i);
      this->state.emplace_back();
      this->state.back().object = item(of_param, 0);
      for (Py_ssize_t j = 1; j + 1 < PyTuple_Size(of_param); j += 2) {
        this->state.push_back(record(item(of_param, j + 1)));
        this->state.back().name = keep(item(of_param, j));
      }
    }
    for (Py_ssize_t i = 0; i < n_params; ++i) {
      this->params.push_back(record(item(params, i)));
      record_grad(item(grads, i), &this->params.back());
      own_.push_back(item(params, i));
    }
    std::sort(own_.begin(), own_.end());
    if (PyErr_Occurred()) throw PythonError();
  }

  // Whether the state of this object is the optimizer's own.
  bool is_param(PyObject* object) const { return std::binary_search(own_.begin(), own_.end(), object); }

  // Whether a step reads what a parameter's state has under a name.
  bool is_read(PyObject* name) const {
    return std::any_of(read_.begin(), read_.end(), [name](const Kept& other) {
      if (name == other.get()) return true;
      return PyUnicode_Check(name) && PyObject_RichCompareBool(name, other.get(), Py_EQ) == 1;
    });
  }

  // Records where the tensors of the state and the parameters have moved: addresses as `check_guard` returns
  // them.
  void move(const int64_t* addresses) {
    for (std::vector<Object>* const objects : {&state, &params}) {
      for (Object& object : *objects) {
        if (!object.type) continue;
        numbers[object.number] = *addresses++;
      }
    }
  }
  // How many addresses that are.
  size_t n_tensors() const {
    size_t n = params.size();
    for (const Object& object : state) n += object.type != nullptr;
    return n;
  }

  const Dlpack to_dlpack;
  KeyReader keys;
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
    if (is_dtensor(object.type, tensor)) {
      object.spec.reset(checked(PyObject_GetAttr(tensor, names().spec)));
    }
    with_local(tensor, object.spec != nullptr, [&](PyObject* local) {
      const DLTensor t = to_dlpack(local);
      if (!keys.knows(local, t)) {
        PyErr_SetString(PyExc_NotImplementedError, "a tensor of another layout");
        throw PythonError();
      }
      object.local_type = Py_TYPE(local);
      object.number = numbers.size();
      object.behind[0] = keys.start_of(local, t);
      object.behind[1] = keys.storage_of(local, t);
      numbers.push_back(address_of(t));
      return record_description(t, keys(local, t));
    });
    return object;
  }

  void record_grad(PyObject* expected, Object* param) {
    if (expected == Py_None) return numbers.push_back(kNoGrad);
    param->grad_type = keep(item(expected, 4));
    DLTensor t = to_dlpack(item(expected, 0));
    std::vector<int64_t> shape = integers(item(expected, 1)), strides = integers(item(expected, 2));
    t.ndim = static_cast<int32_t>(shape.size());
    t.shape = shape.data();
    t.strides = strides.data();
    record_description(t, KeyReader::as_keys(item(expected, 3)));
  }

  // Whether tensors of a type are DTensors. Asking each of the others would raise an AttributeError each
  // time.
  bool is_dtensor(PyTypeObject* type, PyObject* tensor) {
    const auto known = std::find(other_types_.begin(), other_types_.end(), type);
    if (known != other_types_.end()) return false;
    if (PyObject_HasAttr(tensor, names().local_tensor) == 1) return true;
    other_types_.push_back(type);
    return false;
  }

  bool record_description(const DLTensor& t, int64_t keys) {
    return describe(t, keys, [this](int64_t number) { return numbers.push_back(number), true; });
  }

  std::vector<PyObject*> own_;              // the parameters, sorted
  std::vector<Kept> read_;                  // names of what a step reads of a parameter's state
  std::vector<PyTypeObject*> other_types_;  // of tensors that are no DTensors
};

// One comparison with what was recorded.
class Check {
 public:
  explicit Check(Guard& guard)
      : guard_(guard),
        number_(guard.numbers.data()),
        grads_(PyList_New(static_cast<Py_ssize_t>(guard.params.size()))) {
    addresses_.reserve(guard.params.size());
    found_.reserve(guard.state.size() + guard.params.size());
  }

  bool is_same_state(PyObject* state) {
    PyObject *param, *of_param, *name, *value;
    size_t n = 0;
    std::vector<Object>& known = guard_.state;
    for (Py_ssize_t i = 0; PyDict_Next(state, &i, &param, &of_param);) {
      if (n == known.size() || param != known[n].object) {
        if (guard_.is_param(param)) return false;
        continue;  // the user's
      }
      if (!PyDict_Check(of_param)) return false;
      ++n;
      for (Py_ssize_t j = 0; PyDict_Next(of_param, &j, &name, &value);) {
        if (n < known.size() && name == known[n].name.get()) {
          if (!is_alike(value, known, n++)) return false;
        } else if (guard_.is_read(name)) {
          return false;
        }
      }
    }
    return n == known.size();
  }

  bool finds_grads(PyObject* groups) {
    size_t n = 0;
    std::vector<Object>& known = guard_.params;
    for (Py_ssize_t i = 0; i < PyList_Size(groups); ++i) {
      PyObject* const params = PyList_GetItem(groups, i);
      if (!PyList_Check(params)) return false;
      for (Py_ssize_t j = 0; j < PyList_Size(params); ++j, ++n) {
        PyObject* const param = PyList_GetItem(params, j);
        if (n == known.size() || param != known[n].object || !is_alike(param, known, n)) return false;
        if (!finds_grad(known[n])) return false;
      }
    }
    return n == known.size();
  }

  // The gradients found: (bytes, list), the list of what is stepped, and the addresses of all tensors of the
  // state and all parameters, if any has moved.
  PyObject* result() {
    const Owned stepped(PyList_New(static_cast<Py_ssize_t>(stepped_.size())));
    for (size_t i = 0; i < stepped_.size(); ++i)
      PyList_SetItem(stepped.get(), static_cast<Py_ssize_t>(i), stepped_[i].release());
    const Owned bytes(as_bytes(addresses_));
    if (!has_moved_) return checked(PyTuple_Pack(4, bytes.get(), grads_.get(), stepped.get(), Py_None));
    const Owned moved(as_bytes(found_));
    return checked(PyTuple_Pack(4, bytes.get(), grads_.get(), stepped.get(), moved.get()));
  }

 private:
  // Whether the tensor has the description of the n-th recorded one; notes where it is. It may be another
  // object.
  bool is_alike(PyObject* tensor, std::vector<Object>& known, size_t n) {
    if (n + kAhead < known.size()) prefetch(known[n + kAhead]);
    if (Py_TYPE(tensor) != known[n].type) return false;
    PyObject* const spec = known[n].spec.get();
    if (spec && !is_placed(tensor, spec)) return false;
    return with_local(tensor, spec, [&](PyObject* local) {
      if (Py_TYPE(local) != known[n].local_type) return false;
      const DLTensor t = guard_.to_dlpack(local);
      const int64_t address = address_of(t);
      found_.push_back(address);
      if (address != *number_++) {
        if (!address && !is_empty(t)) return false;  // its memory was taken away
        known[n].behind[0] = guard_.keys.start_of(local, t);
        known[n].behind[1] = guard_.keys.storage_of(local, t);
        has_moved_ = true;
      }
      return is_as_expected(local, t);
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
      if (reinterpret_cast<PyObject*>(Py_TYPE(local)) != param.grad_type.get()) return false;
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

  Guard& guard_;
  const int64_t* number_;           // the next one to compare
  std::vector<int64_t> addresses_;  // of gradients
  std::vector<int64_t> found_;      // addresses of all else
  bool has_moved_ = false;
  const Owned grads_;
  std::vector<Kept> stepped_;
};

void destroy(PyObject* capsule) { delete static_cast<Guard*>(PyCapsule_GetPointer(capsule, kCapsule)); }

}  // namespace

PyObject* make_guard(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 6) return PyErr_Format(PyExc_TypeError, "make_guard expects 6 arguments, got %zd", n_args);
  return guarded([args] {
    auto made = std::make_unique<Guard>(args[0], args[1], args[2], args[3], args[4], args[5]);
    PyObject* const capsule = checked(PyCapsule_New(made.get(), kCapsule, &destroy));
    made.release();
    return capsule;
  });
}

PyObject* check_guard(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 3 || !PyList_Check(args[1]))
    return PyErr_Format(PyExc_TypeError, "check_guard expects a capsule, a list and a mapping");
  auto* const guard = static_cast<Guard*>(PyCapsule_GetPointer(args[0], kCapsule));
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

PyObject* move_guard(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 2 || !PyBytes_Check(args[1]))
    return PyErr_Format(PyExc_TypeError, "move_guard expects a capsule and bytes");
  auto* const guard = static_cast<Guard*>(PyCapsule_GetPointer(args[0], kCapsule));
  if (!guard) return nullptr;
  const Py_ssize_t expected = static_cast<Py_ssize_t>(guard->n_tensors() * sizeof(int64_t));
  if (PyBytes_Size(args[1]) != expected)
    return PyErr_Format(PyExc_ValueError, "move_guard expects %zd bytes, got %zd", expected,
                        PyBytes_Size(args[1]));
  std::vector<int64_t> addresses(guard->n_tensors());
  std::memcpy(addresses.data(), PyBytes_AsString(args[1]), static_cast<size_t>(expected));
  guard->move(addresses.data());
  Py_RETURN_NONE;
}

}  // namespace fused_adamw
