// Reads where and how a tensor is from the tensor itself, which DLPack takes ten times as long to say. Where
// torch keeps what is read is found by looking for known values; nothing is relied on that was not found, and
// what this cannot vouch for, DLPack is asked for.
#pragma once

#include <algorithm>

#include "dispatch_keys.h"

namespace fused_adamw {

// What kernels rely on beside a tensor's address.
struct Form {
  // As DLPack describes it.
  std::vector<int64_t> shape, strides;
  int64_t dtype, device, keys;
  // A word of the tensor that holds dtype and device beside flags, and the bits of it that are the same in
  // all tensors of this form that were seen; none before one was.
  mutable uint64_t kind = 0, kind_mask = 0;
  mutable bool is_known = false;

  bool is_empty() const {
    for (const int64_t size : shape)
      if (!size) return true;
    return false;
  }
  int64_t itemsize() const { return (dtype >> 8 & 0xff) * (dtype >> 16) / 8; }
};

inline int64_t dtype_of(const DLTensor& t) {
  return t.dtype.code | t.dtype.bits << 8 | int64_t{t.dtype.lanes} << 16;
}

inline int64_t device_of(const DLTensor& t) {
  return t.device.device_type | int64_t{t.device.device_id} << 32;
}

inline Form form_of(const DLTensor& t, int64_t keys) {
  return {{t.shape, t.shape + t.ndim}, {t.strides, t.strides + t.ndim}, dtype_of(t), device_of(t), keys};
}

// Whether a tensor is as DLPack describes those of a form.
inline bool has_description(const DLTensor& t, int64_t keys, const Form& form) {
  bool is_same = static_cast<size_t>(t.ndim) == form.shape.size() && dtype_of(t) == form.dtype &&
                 device_of(t) == form.device && keys == form.keys;
  for (int32_t i = 0; is_same && i < t.ndim; ++i) {
    // Strides of size 1 are not used.
    is_same = t.shape[i] == form.shape[i] && (t.shape[i] <= 1 || t.strides[i] == form.strides[i]);
  }
  return is_same;
}

class TensorMemory {
 public:
  // Where a tensor is: its elements, and what frees them, by which storages that are copied on write show.
  struct Place {
    const char* storage = nullptr;
    int64_t address = 0, context = 0;
  };

  // probes: as for KeyReader.
  void locate(const KeyReader& keys, PyObject* probes) {
    const auto number_of = [](const char* name) {
      return [name](PyObject* tensor) {
        return number(Owned(PyObject_CallMethod(tensor, name, nullptr)).get());
      };
    };
    const auto in_tensor = [](PyObject* tensor) { return cdata_of(tensor); };
    const auto self = [](PyObject* tensor) { return reinterpret_cast<const char*>(tensor); };
    const auto storage = [](PyObject* tensor) {
      return cdata_of(Owned(PyObject_CallMethod(tensor, "untyped_storage", nullptr)).get());
    };
    sizes_ = keys.sizes();
    keys_ = keys.keys();
    object_ = find(probes, self, in_tensor, kObjectBytes);
    python_ = find(probes, in_tensor, self, keys_);
    storage_ = find(probes, in_tensor, storage, keys_);
    dims_ = find(probes, in_tensor, number_of("dim"), keys_);
    offset_ = find(probes, in_tensor, number_of("storage_offset"), keys_);
    data_ = find(
        probes, storage,
        [&](PyObject* tensor) {
          const Owned found(PyObject_CallMethod(tensor, "untyped_storage", nullptr));
          return number(Owned(PyObject_CallMethod(found.get(), "data_ptr", nullptr)).get());
        },
        kStorageBytes);
    const bool all = std::min({object_, python_, storage_, dims_, offset_, data_}) >= 0 && sizes_ > 0;
    is_found_ = all && keys_ >= word && tells_kinds_apart(probes);
  }

  bool is_found() const { return is_found_; }

  // The tensor behind a Python object.
  const char* tensor_of(PyObject* object) const {
    return pointer(reinterpret_cast<const char*>(object) + object_);
  }

  // Its Python object, if it has one.
  PyObject* object_of(const char* tensor) const {
    // Some versions of torch mark the pointer in its lowest bit.
    return reinterpret_cast<PyObject*>(load(tensor + python_) & ~int64_t{7});
  }

  Place place_of(const char* tensor, const Form& form) const {
    Place place;
    if (!is_found_) return place;
    place.storage = pointer(tensor + storage_);
    if (!place.storage || !load(place.storage + data_)) return place;
    place.address = load(place.storage + data_) + load(tensor + offset_) * form.itemsize();
    place.context = load(place.storage + data_ + word);
    return place;
  }

  // Whether a tensor is surely of a form: false says nothing.
  bool has_form(const char* tensor, const Form& form) const {
    const size_t dims = form.shape.size();
    if (!form.is_known || load(tensor + dims_) != static_cast<int64_t>(dims)) return false;
    if ((static_cast<uint64_t>(load(tensor + keys_ - word)) ^ form.kind) & form.kind_mask) return false;
    if (load(tensor + keys_) != form.keys) return false;
    const char* const sizes = tensor + sizes_;
    for (size_t i = 0; i < dims; ++i) {
      if (load(sizes + word * i) != form.shape[i]) return false;
      if (form.shape[i] > 1 && load(sizes + word * (kInlineDims + i)) != form.strides[i]) return false;
    }
    return true;
  }

  // Learns what tensors of a form look like from one that DLPack says to be of it, if reading it gives what
  // DLPack says. Tensors of a form have the same dtype and device: bits in which they differ are others.
  void learn(const char* tensor, const DLTensor& t, const Form& form) const {
    if (!is_found_ || t.ndim > kInlineDims || form.is_empty()) return;
    const uint64_t kind = static_cast<uint64_t>(load(tensor + keys_ - word));
    const uint64_t mask = form.is_known ? form.kind_mask & ~(form.kind ^ kind) : ~uint64_t{0};
    Form seen = form;
    seen.kind = kind;
    seen.kind_mask = mask;
    seen.is_known = true;
    if (!has_form(tensor, seen) || place_of(tensor, seen).address != address_of(t)) return;
    form.kind = kind;
    form.kind_mask = mask;
    form.is_known = true;
  }

  // What a check reads of a tensor, to be fetched ahead. Any address will do.
  void prefetch(const char* tensor, const char* storage) const {
    __builtin_prefetch(tensor);
    __builtin_prefetch(tensor + 64);
    __builtin_prefetch(tensor + 128);
    __builtin_prefetch(tensor + keys_ + word - 1);
    __builtin_prefetch(storage + data_);
  }
  void prefetch_storage(const char* tensor) const { __builtin_prefetch(pointer(tensor + storage_) + data_); }

 private:
  static constexpr int64_t word = sizeof(int64_t);
  // Up to so many dimensions, torch keeps sizes and then strides in the tensor itself.
  static constexpr int32_t kInlineDims = 5;
  // Within how many bytes things are looked for: in a tensor, before its keys.
  static constexpr int64_t kObjectBytes = 40, kStorageBytes = 48;

  static int64_t load(const char* from) {
    int64_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static const char* pointer(const char* from) { return reinterpret_cast<const char*>(load(from)); }
  static int64_t number(PyObject* object) {
    // An address may use the highest bit.
    return static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(object));
  }
  static int64_t as_number(const char* address) { return reinterpret_cast<int64_t>(address); }
  static int64_t as_number(int64_t value) { return value; }

  // The offset within `start(tensor)` at which all probes have what is expected of them; -1: there is none.
  template <typename Start, typename Expected>
  static int64_t find(PyObject* probes, const Start& start, const Expected& expected, int64_t bytes) {
    for (int64_t offset = 0; offset < bytes; offset += word) {
      bool found = true;
      for (Py_ssize_t i = 0; found && i < size_of(probes); ++i) {
        PyObject* const tensor = item(item(probes, i), 0);
        found = load(start(tensor) + offset) == as_number(expected(tensor));
      }
      if (found) return offset;
    }
    return -1;
  }

  // Whether the word before the keys differs wherever dtype or device do, in bits that are the same wherever
  // these are.
  bool tells_kinds_apart(PyObject* probes) const {
    const Py_ssize_t n = size_of(probes);
    const auto kind = [&](Py_ssize_t i) {
      return static_cast<uint64_t>(load(cdata_of(item(item(probes, i), 0)) + keys_ - word));
    };
    const auto same = [&](Py_ssize_t i, Py_ssize_t j, const char* name) {
      const Owned a(PyObject_GetAttrString(item(item(probes, i), 0), name));
      const Owned b(PyObject_GetAttrString(item(item(probes, j), 0), name));
      return PyObject_RichCompareBool(a.get(), b.get(), Py_EQ) == 1;
    };
    uint64_t others = 0;
    for (const bool is_first : {true, false}) {
      for (Py_ssize_t i = 0; i < n; ++i) {
        for (Py_ssize_t j = 0; j < i; ++j) {
          const bool alike = same(i, j, "dtype") && same(i, j, "device");
          if (is_first && alike) others |= kind(i) ^ kind(j);
          if (!is_first && !alike && !((kind(i) ^ kind(j)) & ~others)) return false;
        }
      }
    }
    return true;
  }

  bool is_found_ = false;
  // Offsets: of the tensor in its Python object; of the latter, the storage, sizes, their number, the offset
  // in the storage and the keys in the tensor; of the address in the storage.
  int64_t object_ = -1, python_ = -1, storage_ = -1, sizes_ = -1, dims_ = -1, offset_ = -1, keys_ = -1;
  int64_t data_ = -1;
};

}  // namespace fused_adamw
