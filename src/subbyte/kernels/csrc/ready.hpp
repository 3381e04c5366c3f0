// A plain call of one packed layer in one step. Only bindings.cpp includes this.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "conv.hpp"
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
// tensors that it was made of. A call answers only while all of that still holds, and for plain
// activations; whatever else it is asked is left to the long way, which finds the same values.
class Ready {
 public:
  // panel: a Panel or ConvPanels, which stays alive; origin: its Origins. versions: of words and
  // scale as PyTorch counts them, none where it does not.
  struct Made {
    nanobind::object panel, origin, words, scale, bias;
    std::vector<std::int64_t> versions;
  };

  explicit Ready(Made made)
      : made_(std::move(made)),
        origin_(nanobind::cast<const Origins&>(made_.origin)),
        kernels_(&kernels()) {}

  // Whether words and scale are what the panel was made of, by all that a call can ask.
  bool holds() const {
    stale_ = !still();
    return !stale_;
  }
  // What `holds` said last.
  bool stale() const { return stale_; }

 protected:
  static constexpr int kMostDims = 6;
  using View = nanobind::dlpack::dltensor;

  // Whether x is float32 on the CPU and not empty; its sizes in `view`.
  static bool has_floats(nanobind::handle x, View& view) {
    const Exchange* api = exchange_of(Py_TYPE(x.ptr()));
    if (!api) return false;
    if (api->view(x.ptr(), &view)) {
      PyErr_Clear();
      return false;
    }
    if (view.device.device_type != nanobind::device::cpu::value || view.dtype != type_of<float>() ||
        view.ndim < 1 || view.ndim > kMostDims)
      return false;
    return std::all_of(view.shape, view.shape + view.ndim, [](auto size) { return size > 0; });
  }

  // Whether values lie without gaps, dimensions from the outermost to the innermost as named.
  static bool lies(const View& view, std::initializer_list<int> order) {
    std::int64_t step = 1;
    for (const int* i = order.end(); i-- != order.begin(); step *= view.shape[*i])
      if (view.shape[*i] != 1 && view.strides[*i] != step) return false;
    return true;
  }
  static bool dense(const View& view) {
    std::int64_t step = 1;
    for (int i = view.ndim; i-- > 0; step *= view.shape[i])
      if (view.shape[i] != 1 && view.strides[i] != step) return false;
    return true;
  }

  // The values that a result is finished with; the bias stays alive with this.
  Finish finish(std::int64_t rows, float low, float high) const {
    const auto bias = maybe<float>(made_.bias, "bias");
    if (bias) bias->require_length(rows);
    return {bias ? bias->data() : nullptr, nullptr, low, high};
  }

  // A method of a tensor with such arguments; not valid, and no Python error left, where it fails.
  static nanobind::object ask(PyObject* name, PyObject* const* arguments, int n) {
    PyObject* made =
        PyObject_VectorcallMethod(name, arguments, static_cast<std::size_t>(n), nullptr);
    if (!made) PyErr_Clear();
    return nanobind::steal(made);
  }

  // product(): the odd rows or images.
  template <class F>
  static nanobind::object answer(nanobind::object result, F&& product) {
    bool odd;
    {
      nanobind::gil_scoped_release released;
      odd = !product().empty();
    }
    return odd ? nanobind::none() : result;
  }

  const Made made_;
  const Origins& origin_;
  const Kernels* kernels_;
  mutable bool stale_ = false;  // the interpreter's lock is held where it is used

 private:
  static std::int64_t version(const nanobind::object& tensor) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    PyObject* found = PyObject_GetAttr(tensor.ptr(), name);
    const std::int64_t count = found ? PyLong_AsLong(found) : -1;
    Py_XDECREF(found);
    if (count == -1) PyErr_Clear();
    return count;
  }

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
};

class ReadyLinear : public Ready {
 public:
  explicit ReadyLinear(Made made)
      : Ready(std::move(made)), panel_(nanobind::cast<const Panel&>(made_.panel)) {}

  // x float32 [..., in], or an object of any kind -> [..., out], or None where the long way has to
  // go.
  nanobind::object call(nanobind::handle x, float low, float high, Precision precision,
                        int threads) const {
    View view;
    stale_ = false;
    if (!has_floats(x, view) || view.shape[view.ndim - 1] != panel_.inputs() || !dense(view) ||
        !holds())
      return nanobind::none();
    const Array<float> in(x, "x");
    nanobind::object result = like(x, view);
    if (!result.is_valid()) return nanobind::none();
    const Array<float> out(result, "y");
    const Finish last = finish(panel_.rows, low, high);
    return answer(std::move(result), [&] {
      return linear(*kernels_, panel_, in.data(), in.size() / in.last(), out.data(), last,
                    precision, threads);
    });
  }

 private:
  // x.new_empty(..., rows)
  nanobind::object like(nanobind::handle x, const View& view) const {
    static PyObject* const name = PyUnicode_InternFromString("new_empty");
    PyObject* arguments[kMostDims + 1] = {x.ptr()};
    for (int i = 0; i < view.ndim; ++i)
      arguments[i + 1] = PyLong_FromLongLong(i + 1 < view.ndim ? view.shape[i] : panel_.rows);
    nanobind::object made = ask(name, arguments, view.ndim + 1);
    for (int i = 0; i < view.ndim; ++i) Py_XDECREF(arguments[i + 1]);
    return made;
  }

  const Panel& panel_;
};

class ReadyConv : public Ready {
 public:
  explicit ReadyConv(Made made)
      : Ready(std::move(made)), panels_(nanobind::cast<const ConvPanels&>(made_.panel)) {}

  // x float32 [n, c, h, w] without gaps, or with its channels together, which the result has then,
  // too; else as ReadyLinear.
  nanobind::object call(nanobind::handle x, float low, float high, Precision precision,
                        int threads) const {
    View view;
    stale_ = false;
    const ConvShape& s = panels_.shape();
    if (!has_floats(x, view) || view.ndim != 4 || view.shape[1] != s.channels ||
        !s.covers(view.shape[2], view.shape[3]))
      return nanobind::none();
    const bool last = !dense(view);
    if ((last && !lies(view, {0, 2, 3, 1})) || !holds()) return nanobind::none();
    const std::int64_t n = view.shape[0], h = view.shape[2], w = view.shape[3];
    const Array<float> in(x, "x");
    nanobind::object result = like(x, {n, s.out_channels, s.out_h(h), s.out_w(w)}, last);
    if (!result.is_valid()) return nanobind::none();
    const Array<float> out(result, "y");
    const Finish done = finish(s.out_channels, low, high);
    return answer(std::move(result), [&] {
      return conv2d(*kernels_, panels_, in.data(), n, h, w, out.data(), last, done, precision,
                    threads);
    });
  }

 private:
  // x.new_empty_strided(size, strides)
  static nanobind::object like(nanobind::handle x, const std::array<std::int64_t, 4>& size,
                               bool last) {
    static PyObject* const name = PyUnicode_InternFromString("new_empty_strided");
    const std::int64_t image = size[1] * size[2] * size[3];
    const auto sizes = nanobind::make_tuple(size[0], size[1], size[2], size[3]);
    const auto strides = last ? nanobind::make_tuple(image, 1, size[3] * size[1], size[1])
                              : nanobind::make_tuple(image, size[2] * size[3], size[3], 1);
    PyObject* const arguments[3] = {x.ptr(), sizes.ptr(), strides.ptr()};
    return ask(name, arguments, 3);
  }

  const ConvPanels& panels_;
};

}  // namespace subbyte
