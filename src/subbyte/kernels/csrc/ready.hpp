// A plain call of one packed Linear layer in one step. Only bindings.cpp includes this.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "dispatch.hpp"
#include "linear.hpp"
#include "origin.hpp"

namespace subbyte {

// What a panel was made of: words, and scales of whatever type they are stored in.
class Origins {
 public:
  Origins(nanobind::handle words, nanobind::handle scale) : words(of(words)), scale(of(scale)) {}

  bool same(nanobind::handle words, nanobind::handle scale) const {
    return holds<&Origin::same>(words, scale);
  }
  bool glance(nanobind::handle words, nanobind::handle scale) const {
    return holds<&Origin::glance>(words, scale);
  }

 private:
  struct View {
    explicit View(nanobind::handle object) : array(object, "a panel's origin") {
      if (!array.dense()) array.fail("has gaps");
    }
    const std::uint8_t* data() const { return static_cast<const std::uint8_t*>(array.data()); }
    Array<void> array;
  };
  static Origin of(nanobind::handle object) {
    const View view(object);
    return {view.data(), view.array.bytes()};
  }
  template <auto Holds>
  bool holds(nanobind::handle first, nanobind::handle second) const {
    const View a(first), b(second);
    return (words.*Holds)(a.data(), a.array.bytes()) && (scale.*Holds)(b.data(), b.array.bytes());
  }

  Origin words, scale;
};

// What a layer multiplies with, as it was when its last call took the long way: a panel and the
// tensors that it was made of. `call` answers only while all of that still holds, and for plain
// activations; whatever else it is asked is left to the long way, which finds the same values.
class ReadyLinear {
 public:
  // panel: a Panel, which stays alive; origin: its Origins. versions: of words and scale as PyTorch
  // counts them, none where it does not.
  struct Made {
    nanobind::object panel, origin, words, scale, bias;
    std::vector<std::int64_t> versions;
  };

  explicit ReadyLinear(Made made)
      : made_(std::move(made)),
        panel_(nanobind::cast<const Panel&>(made_.panel)),
        origin_(nanobind::cast<const Origins&>(made_.origin)),
        kernels_(&kernels()) {}

  // Whether words and scale are what the panel was made of, by all that a call can ask.
  bool holds() const {
    stale_ = !still();
    return !stale_;
  }
  // What `holds` said last.
  bool stale() const { return stale_; }

  // x float32 [..., in], or an object of any kind -> [..., out], or None where the long way has to
  // go.
  nanobind::object call(nanobind::handle x, float low, float high, Precision precision,
                        int threads) const {
    nanobind::dlpack::dltensor view;
    stale_ = false;
    if (!is_plain(x, view) || !holds()) return nanobind::none();
    const Array<float> in(x, "x");
    nanobind::object result = like(x, view);
    if (!result.is_valid()) return nanobind::none();
    const Array<float> out(result, "y");
    const auto bias = maybe<float>(made_.bias, "bias");
    if (bias) bias->require_length(panel_.rows);
    const Finish finish{bias ? bias->data() : nullptr, nullptr, low, high};
    bool odd;
    {
      nanobind::gil_scoped_release released;
      odd = !linear(*kernels_, panel_, in.data(), in.size() / in.last(), out.data(), finish,
                    precision, threads)
                 .empty();
    }
    return odd ? nanobind::none() : result;
  }

 private:
  static constexpr int kMostDims = 6;

  bool still() const {
    if (kernels_ != &kernels()) return false;
    const auto& counted = made_.versions;
    if (!counted.empty() &&
        (version(made_.words) != counted[0] || version(made_.scale) != counted[1]))
      return false;
    try {
      return origin_.glance(made_.words, made_.scale);
    } catch (const std::invalid_argument&) {  // has gaps now: for the long way to tell
      return false;
    }
  }

  static std::int64_t version(const nanobind::object& tensor) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    PyObject* found = PyObject_GetAttr(tensor.ptr(), name);
    const std::int64_t count = found ? PyLong_AsLong(found) : -1;
    Py_XDECREF(found);
    if (count == -1) PyErr_Clear();
    return count;
  }

  // float32 on the CPU without gaps, of the panel's width, not empty; its sizes in `view`.
  bool is_plain(nanobind::handle x, nanobind::dlpack::dltensor& view) const {
    const Exchange* api = exchange_of(Py_TYPE(x.ptr()));
    if (!api) return false;
    if (api->view(x.ptr(), &view)) {
      PyErr_Clear();
      return false;
    }
    if (view.device.device_type != nanobind::device::cpu::value || view.dtype != type_of<float>() ||
        view.ndim < 1 || view.ndim > kMostDims)
      return false;
    if (view.shape[view.ndim - 1] != panel_.inputs()) return false;
    std::int64_t step = 1;
    for (int i = view.ndim; i-- > 0; step *= view.shape[i])
      if (view.shape[i] == 0 || (view.shape[i] != 1 && view.strides[i] != step)) return false;
    return true;
  }

  // x.new_empty(..., rows); not valid, and no Python error left, where that fails.
  nanobind::object like(nanobind::handle x, const nanobind::dlpack::dltensor& view) const {
    static PyObject* const name = PyUnicode_InternFromString("new_empty");
    PyObject* arguments[kMostDims + 1] = {x.ptr()};
    for (int i = 0; i < view.ndim; ++i)
      arguments[i + 1] = PyLong_FromLongLong(i + 1 < view.ndim ? view.shape[i] : panel_.rows);
    PyObject* made = PyObject_VectorcallMethod(name, arguments,
                                               static_cast<std::size_t>(view.ndim) + 1, nullptr);
    for (int i = 0; i < view.ndim; ++i) Py_XDECREF(arguments[i + 1]);
    if (!made) PyErr_Clear();
    return nanobind::steal(made);
  }

  Made made_;
  const Panel& panel_;
  const Origins& origin_;
  const Kernels* kernels_;
  mutable bool stale_ = false;  // the interpreter's lock is held where it is used
};

}  // namespace subbyte
