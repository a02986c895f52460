// What a guard has recorded of an optimizer's tensors.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <new>

#include "../torch/direct.h"
#include "tensor_memory.h"

namespace fused_adamw {

// Attributes that a check reads.
struct Names {
  PyObject* const grad = checked(PyUnicode_InternFromString("grad"));
  PyObject* const local_tensor = checked(PyUnicode_InternFromString("_local_tensor"));
  PyObject* const mesh = checked(PyUnicode_InternFromString("mesh"));
  PyObject* const placements = checked(PyUnicode_InternFromString("placements"));
  PyObject* const shape = checked(PyUnicode_InternFromString("shape"));
  PyObject* const spec = checked(PyUnicode_InternFromString("_spec"));
};

inline const Names& names() {
  static const Names all;
  return all;
}

inline std::vector<int64_t> integers(PyObject* tuple) {
  std::vector<int64_t> found;
  for (Py_ssize_t i = 0; i < size_of(tuple); ++i) found.push_back(PyLong_AsLongLong(item(tuple, i)));
  if (PyErr_Occurred()) throw PythonError();
  return found;
}

// A strong reference, or nothing.
struct Decref {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};
using Kept = std::unique_ptr<PyObject, Decref>;

inline Kept keep(PyObject* object) {
  Py_IncRef(object);
  return Kept(object);
}

struct Object {
  PyObject* object = nullptr;
  PyTypeObject* type = nullptr;  // none: a parameter as a key of the state
  PyTypeObject* local_type = nullptr;
  const Form* form = nullptr;
  TensorMemory::Place place;  // where it was recorded to be
  int64_t seen = 0;           // its address in the last check
  // Where the tensor was, which a check reaches through the object: a hint to prefetch.
  const char* tensor = nullptr;
  Kept name;  // under which the state has it
  Kept spec;  // where a DTensor is: its mesh and placements; nothing for other tensors
};

// What the gradient of a parameter is like.
struct Expected {
  const Form* form = nullptr;  // none: there must not be one
  Kept type;
  const char* place = nullptr;  // where the parameter keeps it: a hint to prefetch
};

// Calls f with the tensor, or with the local tensor of a DTensor.
template <typename F>
bool with_local(PyObject* tensor, bool is_dtensor, const F& f) {
  if (!is_dtensor) return f(tensor);
  return f(Owned(PyObject_GetAttr(tensor, names().local_tensor)).get());
}

// References that a step needs, given back when it is over.
struct Held {
  std::vector<PyObject*> params;
  std::vector<void*> grads;

  Held() = default;
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { let_go(); }
  // Room for so many: what `hold` takes cannot get lost for want of it.
  void reserve(size_t n) {
    grads.reserve(n);
    params.reserve(n);
  }
  void hold(PyObject* param, const void* grad) {
    void* const held = fused_adamw::hold(&grad);
    if (!held) throw std::bad_alloc();
    grads.push_back(held);
    Py_IncRef(param);
    params.push_back(param);
  }
  void let_go() {
    for (void* const grad : grads) release(grad);
    for (PyObject* const param : params) Py_DecRef(param);
    grads.clear();
    params.clear();
  }
};

// What was recorded.
class Guard {
 public:
  Guard(PyObject* tensor_type, PyObject* params, PyObject* grads, PyObject* state, PyObject* read,
        PyObject* probes, PyObject* table, bool by_objects)
      : to_dlpack(tensor_type), table(static_cast<int64_t*>(PyLong_AsVoidPtr(table))) {
    if (PyErr_Occurred()) throw PythonError();
    keys.locate(to_dlpack(item(item(probes, 0), 0)), probes);
    memory.locate(keys, probes);
    const Py_ssize_t n_state = size_of(state), n_params = size_of(params);
    for (Py_ssize_t i = 0; i < size_of(read); ++i) read_.push_back(keep(item(read, i)));
    this->state.reserve(4 * static_cast<size_t>(n_state));
    this->params.reserve(static_cast<size_t>(n_params));
    for (Py_ssize_t i = 0; i < n_state; ++i) {
      PyObject* const of_param = item(state, i);
      this->state.emplace_back();
      this->state.back().object = item(of_param, 0);
      for (Py_ssize_t j = 1; j + 1 < size_of(of_param); j += 2) {
        this->state.push_back(record(item(of_param, j + 1)));
        this->state.back().name = keep(item(of_param, j));
      }
    }
    bool can_be_direct = !by_objects && memory.is_found() && has_direct();
    const Owned grad_of_tensors(PyObject_GetAttr(tensor_type, names().grad));
    for (Py_ssize_t i = 0; i < n_params; ++i) {
      PyObject* const param = item(params, i);
      this->params.push_back(record(param));
      this->grads.push_back(expected(item(grads, i)));
      own_.push_back(param);
      const Owned grad(PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(param)), names().grad));
      can_be_direct &= !this->params.back().spec && grad.get() == grad_of_tensors.get();
    }
    std::sort(own_.begin(), own_.end());
    if (PyErr_Occurred()) throw PythonError();
    if (can_be_direct) {
      no_grad = *grad_of(cdata_of(item(item(probes, 0), 0)));
      is_direct = true;
    }
    type_of_tensors = tensor_type;
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

  // Calls f with each tensor of the state and each parameter.
  template <typename F>
  void for_tensors(const F& f) {
    for (std::vector<Object>* const objects : {&state, &params})
      for (Object& object : *objects)
        if (object.type) f(object);
  }

  // Writes the address of a gradient to the table.
  void set_grad(size_t i, int64_t address) {
    if (table[i] == address) return;
    if (!table[i] != !address) present.reset();
    table[i] = address;
    ++version;  // at once: a check that ends here has changed the table
  }

  // For each parameter a byte that says whether it has a gradient: the same object while that stays so.
  PyObject* presence() {
    if (!present) {
      std::vector<char> bytes;
      for (size_t i = 0; i < params.size(); ++i) bytes.push_back(table[i] != 0);
      present.reset(checked(PyBytes_FromStringAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size()))));
    }
    return present.get();
  }

  const Dlpack to_dlpack;
  KeyReader keys;
  TensorMemory memory;
  // In the order of a check. Of each parameter in the state itself, then what belongs to it.
  std::vector<Object> state, params;
  std::vector<Expected> grads;
  bool is_direct = false;  // gradients are found without their Python objects
  const void* no_grad = nullptr;
  PyObject* type_of_tensors = nullptr;
  int64_t* const table;  // of the addresses of gradients
  int64_t version = 0;   // of the table
  Kept present;
  // Kept from check to check, as a large allocation is slow where backward has just freed many small ones.
  std::vector<const char*> found;  // gradients
  std::unique_ptr<Held> spare;

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
      object.form = form(t, keys(local, t));
      object.tensor = keys.start_of(local, t);
      memory.learn(object.tensor, t, *object.form);
      object.place = memory.place_of(object.tensor, *object.form);
      object.place.address = object.seen = address_of(t);
      return true;
    });
    return object;
  }

  Expected expected(PyObject* grad) {
    Expected found;
    if (grad == Py_None) return found;
    DLTensor t = to_dlpack(item(grad, 0));
    std::vector<int64_t> shape = integers(item(grad, 1)), strides = integers(item(grad, 2));
    t.ndim = static_cast<int32_t>(shape.size());
    t.shape = shape.data();
    t.strides = strides.data();
    found.form = form(t, KeyReader::as_keys(item(grad, 3)));
    found.type = keep(item(grad, 4));
    return found;
  }

  // The one of this description: tensors share them, so that they stay in the caches.
  const Form* form(const DLTensor& t, int64_t keys) {
    Form made = form_of(t, keys);
    std::vector<int64_t> numbers{made.dtype, made.device, keys};
    for (size_t i = 0; i < made.shape.size(); ++i) {
      numbers.push_back(made.shape[i]);
      numbers.push_back(made.shape[i] > 1 ? made.strides[i] : 0);  // of size 1: not used
    }
    std::unique_ptr<Form>& known = forms_[numbers];
    if (!known) known = std::make_unique<Form>(std::move(made));
    return known.get();
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

  std::map<std::vector<int64_t>, std::unique_ptr<Form>> forms_;
  std::vector<PyObject*> own_;              // the parameters, sorted
  std::vector<Kept> read_;                  // names of what a step reads of a parameter's state
  std::vector<PyTypeObject*> other_types_;  // of tensors that are no DTensors
};

}  // namespace fused_adamw
