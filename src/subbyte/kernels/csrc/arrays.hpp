// The tensors that Python passes, as memory whose type, device, sizes and strides are known.
//
// They come by DLPack: by its exchange functions where the object's type has them (PyTorch does; a
// few nanoseconds a tensor), else by nanobind's slower way (NumPy). Only bindings.cpp includes
// this.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace subbyte {

// What the capsule `__dlpack_c_exchange_api__` of a type points to, by DLPack's specification.
struct Exchange {
  std::uint32_t major, minor;
  const Exchange* older;
  void (*unused[3])();
  int (*view)(void* object, nanobind::dlpack::dltensor* out);  // 0, or a Python error is set
};

// Null for a type that has none. The first types seen to have it are remembered for ever: tensors
// and parameters.
inline const Exchange* exchange_of(PyTypeObject* type) {
  struct Known {
    PyTypeObject* type;
    const Exchange* exchange;
  };
  static Known known[2] = {};
  for (const Known& one : known)
    if (type == one.type) return one.exchange;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const void* pointer = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  if (!pointer) PyErr_Clear();
  Py_XDECREF(capsule);
  const auto* api = static_cast<const Exchange*>(pointer);
  while (api && api->major != 1) api = api->older;
  if (api && !api->view) api = nullptr;
  for (Known& one : known) {
    if (!api || one.type) continue;
    Py_INCREF(reinterpret_cast<PyObject*>(type));
    one = {type, api};
    break;
  }
  return api;
}

template <class T>
constexpr nanobind::dlpack::dtype type_of() {
  using Code = nanobind::dlpack::dtype_code;
  const Code code = std::is_floating_point_v<T> ? Code::Float
                    : std::is_signed_v<T>       ? Code::Int
                                                : Code::UInt;
  return {static_cast<std::uint8_t>(code), 8 * sizeof(T), 1};
}

// T: std::uint8_t, std::int32_t or float, void for any. Valid as long as the Python object is. All
// that is wrong with an object is a std::invalid_argument that begins with its name.
template <class T>
class Array {
 public:
  Array(nanobind::handle object, const char* name) : name_(name) {
    if (const Exchange* api = exchange_of(Py_TYPE(object.ptr()))) {
      if (api->view(object.ptr(), &view_)) {
        const nanobind::python_error error;
        const std::string why(error.what());
        fail("has no memory to read: " + why.substr(0, why.find('\n')));
      }
    } else {
      import(object);
    }
    if (view_.device.device_type != nanobind::device::cpu::value) fail("is not on the CPU");
    if constexpr (!std::is_void_v<T>)
      if (view_.dtype != type_of<T>()) fail("is of another type");
    if (view_.ndim && size() && !view_.data) fail("has no memory");
  }

  T* data() const {
    return reinterpret_cast<T*>(static_cast<std::uint8_t*>(view_.data) + view_.byte_offset);
  }
  int ndim() const { return view_.ndim; }
  std::int64_t size(int i) const { return view_.shape[i]; }
  std::int64_t size() const {
    std::int64_t count = 1;
    for (int i = 0; i < ndim(); ++i) count *= size(i);
    return count;
  }
  std::size_t bytes() const {
    return static_cast<std::size_t>(size()) * view_.dtype.bits * view_.dtype.lanes / 8;
  }
  std::int64_t last() const { return ndim() ? size(ndim() - 1) : 0; }

  // Without gaps, the dimensions from the outermost to the innermost as `order` names them.
  bool dense(std::initializer_list<int> order) const {
    std::int64_t step = 1;
    if (!size()) return true;
    for (const int* i = order.end(); i-- != order.begin();) {
      if (size(*i) != 1 && (!view_.strides || view_.strides[*i] != step)) return false;
      step *= size(*i);
    }
    return true;
  }
  bool dense() const {
    std::int64_t step = 1;
    if (!size()) return true;
    for (int i = ndim(); view_.strides && i-- > 0; step *= size(i))
      if (size(i) != 1 && view_.strides[i] != step) return false;
    return true;
  }

  std::string text() const {
    std::string sizes;
    for (int i = 0; i < ndim(); ++i) sizes += (i ? ", " : "") + std::to_string(size(i));
    return "[" + sizes + "]";
  }
  [[noreturn]] void fail(const std::string& why) const {
    throw std::invalid_argument(name_ + std::string(" ") + why);
  }
  // One dimension of so many values, one behind the other.
  const Array& require_length(std::int64_t count) const {
    if (ndim() != 1 || size(0) != count)
      fail("is " + text() + "; expected [" + std::to_string(count) + "]");
    if (!dense()) fail("has gaps");
    return *this;
  }

 private:
  void import(nanobind::handle object) {
    if (!nanobind::try_cast(object, owner_)) fail("is no array of the CPU");
    view_.data = owner_.data_handle(), view_.byte_offset = owner_.byte_offset();
    view_.device = {owner_.device_type(), owner_.device_id()};
    view_.ndim = static_cast<std::int32_t>(owner_.ndim()), view_.dtype = owner_.dtype();
    view_.shape = const_cast<std::int64_t*>(owner_.shape_ptr());
    view_.strides = const_cast<std::int64_t*>(owner_.stride_ptr());
  }

  const char* name_;
  nanobind::dlpack::dltensor view_;
  nanobind::ndarray<nanobind::ro> owner_;
};

// None is no array.
template <class T>
std::optional<Array<T>> maybe(nanobind::handle object, const char* name) {
  if (object.is_none()) return std::nullopt;
  return std::optional<Array<T>>(std::in_place, object, name);
}

}  // namespace subbyte
