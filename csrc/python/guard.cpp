#include "guard.h"

#include <cstring>
#include <exception>

#include "records.h"

namespace fused_adamw {
namespace {

constexpr char kCapsule[] = "fused_adamw.guard";
constexpr char kHeldCapsule[] = "fused_adamw.held";
// How many objects ahead a check prefetches.
constexpr size_t kAhead = 12;

// One comparison with what was recorded.
class Check {
 public:
  explicit Check(Guard& guard) : guard_(guard), held_(std::move(guard.spare)) {
    if (!held_) held_ = std::make_unique<Held>();
    if (!guard.is_direct) {
      grads_.reset(checked(PyList_New(static_cast<Py_ssize_t>(guard.params.size()))));
      stepped_.reset(checked(PyList_New(0)));
    }
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

  bool finds_params(PyObject* groups) {
    size_t n = 0;
    std::vector<Object>& known = guard_.params;
    for (Py_ssize_t i = 0; i < PyList_Size(groups); ++i) {
      PyObject* const params = PyList_GetItem(groups, i);
      if (!PyList_Check(params)) return false;
      for (Py_ssize_t j = 0; j < PyList_Size(params); ++j, ++n) {
        PyObject* const param = PyList_GetItem(params, j);
        if (n == known.size() || param != known[n].object || !is_alike(param, known, n)) return false;
      }
    }
    return n == known.size();
  }

  bool finds_grads() {
    const size_t n = guard_.params.size();
    if (!guard_.is_direct) {
      for (size_t i = 0; i < n; ++i)
        if (!finds_object(i)) return false;
      return true;
    }
    hold_grads();
    for (size_t i = 0; i < n; ++i)
      if (!finds_directly(i)) return false;
    return true;
  }

  // (version of the table, presence, list of gradients or None, what is stepped, addresses if anything moved)
  PyObject* result(PyObject* guard) {
    const Owned version(PyLong_FromLongLong(guard_.version));
    const Kept moved = has_moved_ ? addresses() : keep(Py_None);
    PyObject* const presence = guard_.presence();
    if (!guard_.is_direct)
      return checked(PyTuple_Pack(5, version.get(), presence, grads_.get(), stepped_.get(), moved.get()));
    const Owned held(PyCapsule_New(held_.get(), kHeldCapsule, &let_go));
    held_.release();
    PyCapsule_SetContext(held.get(), guard);
    Py_IncRef(guard);
    return checked(PyTuple_Pack(5, version.get(), presence, Py_None, held.get(), moved.get()));
  }

 private:
  // Gives what a step held back, and its lists to the guard.
  static void let_go(PyObject* capsule) {
    std::unique_ptr<Held> held(static_cast<Held*>(PyCapsule_GetPointer(capsule, kHeldCapsule)));
    auto* const owner = static_cast<PyObject*>(PyCapsule_GetContext(capsule));
    held->let_go();
    if (!owner) return;
    static_cast<Guard*>(PyCapsule_GetPointer(owner, kCapsule))->spare = std::move(held);
    Py_DecRef(owner);
  }

  Kept addresses() {
    std::vector<int64_t> found;
    guard_.for_tensors([&](const Object& object) { found.push_back(object.seen); });
    return Kept(checked(as_bytes(found)));
  }

  // Whether the tensor has the description of the n-th recorded one; notes where it is. It may be another
  // object.
  bool is_alike(PyObject* tensor, std::vector<Object>& known, size_t n) {
    if (n + kAhead < known.size()) prefetch(known[n + kAhead]);
    Object& object = known[n];
    if (Py_TYPE(tensor) != object.type) return false;
    PyObject* const spec = object.spec.get();
    if (spec && !is_placed(tensor, spec)) return false;
    return with_local(tensor, spec, [&](PyObject* local) {
      if (Py_TYPE(local) != object.local_type) return false;
      return is_unchanged(local, object) || is_described(local, object);
    });
  }

  // Whether the tensor surely is where and as it was: false says nothing.
  bool is_unchanged(PyObject* tensor, Object& object) const {
    const TensorMemory& memory = guard_.memory;
    if (!object.form->is_known) return false;
    const char* const at = memory.tensor_of(tensor);
    if (!memory.has_form(at, *object.form)) return false;
    const TensorMemory::Place place = memory.place_of(at, *object.form);
    if (place.address != object.place.address || place.context != object.place.context) return false;
    object.seen = place.address;
    return true;
  }

  bool is_described(PyObject* tensor, Object& object) {
    const DLTensor t = guard_.to_dlpack(tensor);
    const int64_t address = address_of(t);
    if (!has_description(t, guard_.keys(tensor, t), *object.form)) return false;
    if (!address && !object.form->is_empty()) return false;  // its memory was taken away
    object.tensor = guard_.keys.start_of(tensor, t);
    guard_.memory.learn(object.tensor, t, *object.form);
    const int64_t recorded = object.place.address;
    object.place = guard_.memory.place_of(object.tensor, *object.form);
    object.place.address = recorded;
    object.seen = address;
    has_moved_ |= address != recorded;
    return true;
  }

  // In training, none of this is in the caches, and each object is reached through a pointer in another.
  // Forced inline: GCC would otherwise see a function without effects and drop the call.
  __attribute__((always_inline)) void prefetch(const Object& object) const {
    __builtin_prefetch(object.object);
    guard_.memory.prefetch(object.tensor, object.place.storage);
  }

  // Finds all gradients and holds them. Nothing between one and the other may run Python, which might drop
  // them. Each pass has fetched what the next one reads.
  void hold_grads() {
    const TensorMemory& memory = guard_.memory;
    std::vector<const char*>& found = guard_.found;
    std::vector<Expected>& known = guard_.grads;
    found.assign(known.size(), nullptr);
    held_->reserve(known.size());
    for (size_t i = 0; i < known.size(); ++i) {
      if (i + kAhead < known.size()) __builtin_prefetch(known[i + kAhead].place);
      const TensorPlace place = grad_of(memory.tensor_of(guard_.params[i].object));
      known[i].place = reinterpret_cast<const char*>(place);
      if (*place == guard_.no_grad) continue;
      found[i] = static_cast<const char*>(*place);
      memory.prefetch(found[i], nullptr);
    }
    for (size_t i = 0; i < known.size(); ++i) {
      if (!found[i]) continue;
      held_->hold(guard_.params[i].object, found[i]);
      memory.prefetch_storage(found[i]);
    }
  }

  bool finds_directly(size_t n) {
    const char* const grad = guard_.found[n];
    const Expected& expected = guard_.grads[n];
    if (!grad) return guard_.set_grad(n, 0), true;
    if (!expected.form) return false;
    const TensorMemory& memory = guard_.memory;
    PyObject* const object = memory.object_of(grad);
    // What has no Python object yet becomes a plain tensor.
    PyObject* const type = object ? reinterpret_cast<PyObject*>(Py_TYPE(object)) : guard_.type_of_tensors;
    if (type != expected.type.get()) return false;
    int64_t address = 0;
    if (memory.has_form(grad, *expected.form)) address = memory.place_of(grad, *expected.form).address;
    if (!address) {
      const Owned described(PyObject_GetAttr(guard_.params[n].object, names().grad));
      address = address_of_grad(described.get(), *expected.form);
      if (!address) return false;
    }
    return guard_.set_grad(n, address), true;
  }

  // 0: it is not what was expected; never 0 of what is there, if only an empty one.
  int64_t address_of_grad(PyObject* grad, const Form& form) {
    const DLTensor t = guard_.to_dlpack(grad);
    const int64_t address = address_of(t);
    if (!has_description(t, guard_.keys(grad, t), form)) return 0;
    guard_.memory.learn(guard_.keys.start_of(grad, t), t, form);
    return !address && form.is_empty() ? 1 : address;
  }

  bool finds_object(size_t n) {
    const Object& param = guard_.params[n];
    const Expected& expected = guard_.grads[n];
    const Owned grad(PyObject_GetAttr(param.object, names().grad));
    if (grad.get() == Py_None) return add(n, 0, grad.get());
    PyObject* const spec = param.spec.get();
    if (!expected.form || (spec && !is_placed(grad.get(), spec))) return false;
    return with_local(grad.get(), spec, [&](PyObject* local) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(local)) != expected.type.get()) return false;
      const int64_t address = address_of_grad(local, *expected.form);
      if (!address) return false;
      is_stepped(param.object);
      if (spec) with_local(param.object, true, [this](PyObject* of_param) { return is_stepped(of_param); });
      return add(n, address, local);
    });
  }

  bool is_stepped(PyObject* tensor) {
    if (PyList_Append(stepped_.get(), tensor) != 0) throw PythonError();
    return true;
  }

  bool add(size_t n, int64_t address, PyObject* grad) {
    Py_IncRef(grad);  // the list steals it
    PyList_SetItem(grads_.get(), static_cast<Py_ssize_t>(n), grad);
    return guard_.set_grad(n, address), true;
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

  Guard& guard_;
  bool has_moved_ = false;
  std::unique_ptr<Held> held_;
  Kept grads_, stepped_;
};

void destroy(PyObject* capsule) { delete static_cast<Guard*>(PyCapsule_GetPointer(capsule, kCapsule)); }

}  // namespace

PyObject* make_guard(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 8) return PyErr_Format(PyExc_TypeError, "make_guard expects 8 arguments, got %zd", n_args);
  return guarded([args] {
    const bool by_objects = PyObject_IsTrue(args[7]) == 1;
    auto made =
        std::make_unique<Guard>(args[0], args[1], args[2], args[3], args[4], args[5], args[6], by_objects);
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
      if (!PyDict_Check(args[2]) || !check.is_same_state(args[2]) || !check.finds_params(args[1]) ||
          !check.finds_grads())
        Py_RETURN_NONE;
    } catch (const PythonError&) {
      if (!PyErr_ExceptionMatches(PyExc_Exception)) throw;  // the user's interrupt
      PyErr_Clear();                                        // it cannot be checked
      Py_RETURN_NONE;
    }
    return check.result(args[0]);
  });
}

PyObject* move_guard(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 2 || !PyBytes_Check(args[1]))
    return PyErr_Format(PyExc_TypeError, "move_guard expects a capsule and bytes");
  auto* const guard = static_cast<Guard*>(PyCapsule_GetPointer(args[0], kCapsule));
  if (!guard) return nullptr;
  Py_ssize_t expected = 0;
  guard->for_tensors([&](Object&) { expected += static_cast<Py_ssize_t>(sizeof(int64_t)); });
  if (PyBytes_Size(args[1]) != expected)
    return PyErr_Format(PyExc_ValueError, "move_guard expects %zd bytes, got %zd", expected,
                        PyBytes_Size(args[1]));
  const char* from = PyBytes_AsString(args[1]);
  guard->for_tensors([&](Object& object) {
    std::memcpy(&object.place.address, from, sizeof(int64_t));
    from += sizeof(int64_t);
  });
  Py_RETURN_NONE;
}

PyObject* count_changes(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 1) return PyErr_Format(PyExc_TypeError, "count_changes expects what check_guard returned");
  const auto* const held = static_cast<const Held*>(PyCapsule_GetPointer(args[0], kHeldCapsule));
  if (!held) return nullptr;
  auto* const owner = static_cast<PyObject*>(PyCapsule_GetContext(args[0]));
  const auto* const guard = static_cast<const Guard*>(PyCapsule_GetPointer(owner, kCapsule));
  try {
    for (PyObject* const param : held->params) bump_version(guard->memory.tensor_of(param));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

}  // namespace fused_adamw
