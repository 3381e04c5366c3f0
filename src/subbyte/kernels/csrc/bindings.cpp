// The only file that knows Python. torch CPU tensors come in without a copy (DLPack).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "conv.hpp"
#include "dispatch.hpp"
#include "linear.hpp"
#include "panels.hpp"
#include "radix.hpp"
#include "roofs.hpp"
#include "threads.hpp"

namespace nb = nanobind;

using InBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

void require_words(std::size_t count, unsigned digits, std::size_t bytes) {
  if (digits == 0 || bytes != 8 * ((count + digits - 1) / digits))
    throw std::invalid_argument("words and codes differ in size");
}

void pack(InBytes codes, unsigned levels, unsigned digits, OutBytes words) {
  require_words(codes.size(), digits, words.size());
  nb::gil_scoped_release released;
  subbyte::radix_pack(codes.data(), codes.size(), levels, digits, words.data());
}

void unpack(InBytes words, unsigned levels, unsigned digits, OutBytes codes) {
  require_words(codes.size(), digits, words.size());
  nb::gil_scoped_release released;
  subbyte::radix_unpack(words.data(), codes.size(), levels, digits, codes.data());
}

// Largest magnitude of an integer sum, which must fit in 32 bits.
void require_room(const subbyte::Panel& panel) {
  const std::int64_t weight = std::max(panel.max_abs, panel.traits().max_digit);
  if (panel.affine.factor * weight * 255 * panel.k >= std::int64_t{1} << 31)
    throw std::invalid_argument("rows are too long for 32-bit sums");
}

subbyte::Panel make_panel(InBytes words, unsigned levels, unsigned digits, std::int64_t first_row,
                          std::int64_t rows, std::int64_t row_length,
                          nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig> order,
                          nb::ndarray<const float, nb::ndim<1>, nb::c_contig> scale, int factor,
                          int center) {
  require_words((words.size() / 8) * digits, digits, words.size());
  const std::size_t stop = static_cast<std::size_t>((first_row + rows) * row_length);
  if (first_row < 0 || rows < 0 || stop > words.size() / 8 * digits ||
      scale.size() != static_cast<std::size_t>(rows))
    throw std::invalid_argument("rows, scales and words differ in size");
  const std::vector<std::int32_t> where(order.data(), order.data() + order.size());
  for (const std::int32_t from : where)
    if (from >= row_length) throw std::invalid_argument("order points past a row");
  nb::gil_scoped_release released;
  subbyte::Panel panel =
      subbyte::make_panel({words.data(), words.size(), levels, digits}, first_row, rows, row_length,
                          where, scale.data(), {factor, center}, subbyte::kernels().tables);
  require_room(panel);
  return panel;
}

// Pointers are the caller's word, 0 for none.
subbyte::Finish finish(std::uintptr_t bias, std::uintptr_t plus, float low, float high) {
  return {reinterpret_cast<const float*>(bias), reinterpret_cast<const float*>(plus), low, high};
}

// planes: of bytes, 0 for float32.
subbyte::Precision precision_of(int planes) {
  if (planes == 0) return subbyte::Precision::kFloat32;
  return planes == 2 ? subbyte::Precision::kInt16 : subbyte::Precision::kInt8;
}

// float32 x [n, panel.k], y and plus [n, panel.rows], bias [panel.rows].
std::vector<std::int64_t> linear(const subbyte::Panel& panel, std::uintptr_t x, std::int64_t n,
                                 std::uintptr_t y, std::uintptr_t bias, std::uintptr_t plus,
                                 float low, float high, int planes, int threads) {
  nb::gil_scoped_release released;
  return subbyte::linear(subbyte::kernels(), panel, reinterpret_cast<const float*>(x), n,
                         reinterpret_cast<float*>(y), finish(bias, plus, low, high),
                         precision_of(planes), threads);
}

using Sizes = std::vector<std::int64_t>;

// Sizes of ConvShape in its order.
subbyte::ConvPanels make_conv(InBytes words, unsigned levels, unsigned digits, const Sizes& sizes,
                              nb::ndarray<const float, nb::ndim<1>, nb::c_contig> scale, int factor,
                              int center) {
  require_words((words.size() / 8) * digits, digits, words.size());
  const subbyte::ConvShape shape{sizes.at(0),  sizes.at(1),  sizes.at(2), sizes.at(3), sizes.at(4),
                                 sizes.at(5),  sizes.at(6),  sizes.at(7), sizes.at(8), sizes.at(9),
                                 sizes.at(10), sizes.at(11), sizes.at(12)};
  const std::int64_t weights =
      shape.out_channels * shape.in_group() * shape.kernel_h * shape.kernel_w;
  if (weights > static_cast<std::int64_t>(words.size() / 8 * digits) ||
      scale.size() != static_cast<std::size_t>(shape.out_channels))
    throw std::invalid_argument("sizes, scales and words do not fit together");
  nb::gil_scoped_release released;
  subbyte::ConvPanels panels(shape, {words.data(), words.size(), levels, digits}, scale.data(),
                             {factor, center}, subbyte::kernels().tables);
  for (const subbyte::Panel& panel : panels.panels()) require_room(panel);
  return panels;
}

// float32 x [n, channels, h, w], y and plus [n, out_channels, ...].
Sizes conv2d(const subbyte::ConvPanels& weight, std::uintptr_t x, std::int64_t n, std::int64_t h,
             std::int64_t w, std::uintptr_t y, bool last, std::uintptr_t bias, std::uintptr_t plus,
             float low, float high, int planes, int threads) {
  nb::gil_scoped_release released;
  return subbyte::conv2d(subbyte::kernels(), weight, reinterpret_cast<const float*>(x), n, h, w,
                         reinterpret_cast<float*>(y), last, finish(bias, plus, low, high),
                         precision_of(planes), threads);
}

std::vector<std::string> tier_names() {
  std::vector<std::string> names;
  for (const subbyte::Kernels* tier : subbyte::tiers()) names.push_back(tier->name);
  return names;
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "subbyte's C++ core";
  nb::set_leak_warnings(false);  // a network that lives until the interpreter ends is no leak
  module.def("radix_pack", &pack, nb::arg("codes"), nb::arg("levels"), nb::arg("digits"),
             nb::arg("words"), "Write the radix words of `codes` into `words`.");
  module.def("radix_unpack", &unpack, nb::arg("words"), nb::arg("levels"), nb::arg("digits"),
             nb::arg("codes"), "Write the digits of `words` into `codes`.");

  module.def("tiers", &tier_names, "Instruction sets compiled in that this CPU has, best first.");
  module.def("tier", [] { return std::string(subbyte::kernels().name); }, "The one in use.");
  module.def("select_tier", &subbyte::select_tier, nb::arg("name"), "Use this one from now on.");
  module.def("has_openmp", &subbyte::has_openmp, "Whether the process has an OpenMP runtime.");
  module.def("spin_int8", &subbyte::spin_int8, nb::arg("tier"), nb::arg("rounds"),
             nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>(),
             "Multiply bytes in registers; the multiply-adds done.");
  module.def("spin_float", &subbyte::spin_float, nb::arg("rounds"), nb::arg("threads"),
             nb::call_guard<nb::gil_scoped_release>(), "The same in float32.");
  nb::class_<subbyte::Stream>(module, "Stream", "Memory to read.")
      .def(nb::init<std::size_t>(), nb::arg("bytes"))
      .def("read", &subbyte::Stream::read, nb::arg("passes"), nb::arg("threads"),
           nb::call_guard<nb::gil_scoped_release>(), "Read all of it; the bytes read.");
  nb::class_<subbyte::Panel>(module, "Panel", "A weight repacked for the kernels.")
      .def_ro("rows", &subbyte::Panel::rows)
      .def_ro("k", &subbyte::Panel::k)
      .def_prop_ro("bytes", &subbyte::Panel::bytes)
      .def_prop_ro("bits", [](const subbyte::Panel& panel) { return panel.traits().bits(); })
      .def("linear", &linear, nb::arg("x"), nb::arg("n"), nb::arg("y"), nb::arg("bias"),
           nb::arg("plus"), nb::arg("low"), nb::arg("high"), nb::arg("planes"), nb::arg("threads"));
  nb::class_<subbyte::ConvPanels>(module, "ConvPanels", "A convolution's weight, repacked.")
      .def_prop_ro("bytes", &subbyte::ConvPanels::bytes)
      .def("conv2d", &conv2d, nb::arg("x"), nb::arg("n"), nb::arg("h"), nb::arg("w"), nb::arg("y"),
           nb::arg("last"), nb::arg("bias"), nb::arg("plus"), nb::arg("low"), nb::arg("high"),
           nb::arg("planes"), nb::arg("threads"));
  module.def("make_conv", &make_conv, nb::arg("words"), nb::arg("levels"), nb::arg("digits"),
             nb::arg("sizes"), nb::arg("scale"), nb::arg("factor"), nb::arg("center"));
  module.def("make_panel", &make_panel, nb::arg("words"), nb::arg("levels"), nb::arg("digits"),
             nb::arg("first_row"), nb::arg("rows"), nb::arg("row_length"), nb::arg("order"),
             nb::arg("scale"), nb::arg("factor"), nb::arg("center"));
}
