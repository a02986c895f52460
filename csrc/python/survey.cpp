#include "survey.h"

#include <map>

#include "dispatch_keys.h"

namespace fused_adamw {

PyObject* survey(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 3 || !PyList_Check(args[1]))
    return PyErr_Format(PyExc_TypeError, "survey expects a type, a list and a tuple");
  return guarded([args]() -> PyObject* {
    const Dlpack to_dlpack(args[0]);
    KeyReader keys;
    keys.locate(to_dlpack(item(item(args[2], 0), 0)), args[2]);
    std::vector<int64_t> addresses, firsts, form;
    std::map<std::vector<int64_t>, int64_t> first_of;
    for (Py_ssize_t i = 0; i < PyList_Size(args[1]); ++i) {
      PyObject* const tensor = PyList_GetItem(args[1], i);
      const DLTensor t = to_dlpack(tensor);
      if (!keys.knows(tensor, t)) {
        PyErr_SetString(PyExc_NotImplementedError, "a tensor of another layout");
        throw PythonError();
      }
      form.assign({reinterpret_cast<int64_t>(Py_TYPE(tensor)), keys(tensor, t), t.ndim,
                   t.dtype.code | t.dtype.bits << 8 | int64_t{t.dtype.lanes} << 16,
                   t.device.device_type | int64_t{t.device.device_id} << 32});
      form.insert(form.end(), t.shape, t.shape + t.ndim);
      form.insert(form.end(), t.strides, t.strides + t.ndim);
      addresses.push_back(address_of(t));
      firsts.push_back(first_of.try_emplace(form, i).first->second);
    }
    const Owned where(as_bytes(addresses)), alike(as_bytes(firsts));
    return checked(PyTuple_Pack(2, where.get(), alike.get()));
  });
}

}  // namespace fused_adamw
