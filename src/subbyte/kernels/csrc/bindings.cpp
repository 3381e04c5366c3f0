// The only file that knows Python, with arrays.hpp. Whatever it is given, it answers or throws:
// every size is checked before memory is read, std::invalid_argument becomes ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "arrays.hpp"
#include "conv.hpp"
#include "dispatch.hpp"
#include "linear.hpp"
#include "panels.hpp"
#include "radix.hpp"
#include "ready.hpp"
#include "roofs.hpp"
#include "sizes.hpp"
#include "threads.hpp"

namespace nb = nanobind;

using subbyte::Array;
using subbyte::maybe;
using subbyte::Origins;
using subbyte::require;

using Sizes = std::vector<std::int64_t>;

namespace {

using Bytes = Array<std::uint8_t>;
using Floats = Array<float>;

std::size_t length(const Bytes& bytes) {
  bytes.require_length(bytes.size());
  return static_cast<std::size_t>(bytes.size());
}

void require_words(const Bytes& words, const Bytes& codes, unsigned levels, unsigned digits) {
  subbyte::check_radix(levels, digits);
  words.require_length(8 * static_cast<std::int64_t>((length(codes) + digits - 1) / digits));
}

void pack(nb::handle codes, unsigned levels, unsigned digits, nb::handle words) {
  const Bytes from(codes, "codes"), to(words, "words");
  require_words(to, from, levels, digits);
  nb::gil_scoped_release released;
  subbyte::radix_pack(from.data(), from.size(), levels, digits, to.data());
}

void unpack(nb::handle words, unsigned levels, unsigned digits, nb::handle codes) {
  const Bytes from(words, "words"), to(codes, "codes");
  require_words(from, to, levels, digits);
  nb::gil_scoped_release released;
  subbyte::radix_unpack(from.data(), to.size(), levels, digits, to.data());
}

subbyte::Panel make_panel(nb::handle words, unsigned levels, unsigned digits,
                          std::int64_t first_row, std::int64_t rows, std::int64_t row_length,
                          nb::handle order, nb::handle scale, int factor, int center) {
  const Bytes bytes(words, "words");
  const Array<std::int32_t> from(order, "order");
  const Floats scales(scale, "scale");
  const subbyte::RadixCodes codes{bytes.data(), length(bytes), levels, digits};
  from.require_length(from.size());
  scales.require_length(rows);
  const std::vector<std::int32_t> where(from.data(), from.data() + from.size());
  nb::gil_scoped_release released;
  return subbyte::make_panel(codes, first_row, rows, row_length, where, scales.data(),
                             {factor, center}, subbyte::kernels().tables);
}

subbyte::Panel make_panel_of_groups(nb::handle words, unsigned levels, unsigned digits,
                                    std::int64_t rows, std::int64_t row_length, std::int64_t shared,
                                    nb::handle scale, float unit, int factor, int center) {
  const Bytes bytes(words, "words");
  const Floats scales(scale, "scale");
  const subbyte::RadixCodes codes{bytes.data(), length(bytes), levels, digits};
  require(rows >= 1 && row_length >= 1 && shared >= 1, "a panel needs rows, and rows weights");
  scales.require_length(subbyte::product({rows, (row_length - 1) / shared + 1}));
  nb::gil_scoped_release released;
  return subbyte::make_panel_of_groups(codes, rows, row_length, shared, scales.data(), unit,
                                       {factor, center}, subbyte::kernels().tables);
}

// Sizes of ConvShape in its order.
subbyte::ConvPanels make_conv(nb::handle words, unsigned levels, unsigned digits,
                              const Sizes& sizes, nb::handle scale, int factor, int center) {
  const Bytes bytes(words, "words");
  const Floats scales(scale, "scale");
  require(sizes.size() == 13, "sizes are 13 numbers");
  const subbyte::ConvShape shape{sizes[0],  sizes[1],  sizes[2], sizes[3], sizes[4],
                                 sizes[5],  sizes[6],  sizes[7], sizes[8], sizes[9],
                                 sizes[10], sizes[11], sizes[12]};
  const subbyte::RadixCodes codes{bytes.data(), length(bytes), levels, digits};
  scales.require_length(shape.out_channels);
  nb::gil_scoped_release released;
  return {shape, codes, scales.data(), {factor, center}, subbyte::kernels().tables};
}

// planes: of bytes, 0 for float32.
subbyte::Precision precision_of(int planes) {
  require(planes >= 0 && planes <= 2, "planes must be 0, 1 or 2");
  if (planes == 0) return subbyte::Precision::kFloat32;
  return planes == 2 ? subbyte::Precision::kInt16 : subbyte::Precision::kInt8;
}

// Panels of tiers with tables cannot be read by others.
const subbyte::Kernels& kernels_for(bool readable_without) {
  const subbyte::Kernels& tier = subbyte::kernels();
  require(tier.tables || readable_without, "the panel was made for another instruction set");
  return tier;
}

// Whether two tensors have the same sizes.
bool same_sizes(const Floats& a, const Floats& b) {
  bool same = a.ndim() == b.ndim();
  for (int i = 0; same && i < a.ndim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

subbyte::Finish finish(const std::optional<Floats>& bias, const std::optional<Floats>& plus,
                       std::int64_t rows, const Floats& y, float low, float high) {
  if (bias) bias->require_length(rows);
  if (plus && !same_sizes(*plus, y)) plus->fail("is " + plus->text() + ", y is " + y.text());
  return {bias ? bias->data() : nullptr, plus ? plus->data() : nullptr, low, high};
}

// float32 x [..., panel.inputs()], y and plus [..., panel.rows], bias [panel.rows].
Sizes linear(const subbyte::Panel& panel, nb::handle x, nb::handle y, nb::handle bias,
             nb::handle plus, float low, float high, int planes, int threads) {
  const Floats in(x, "x"), out(y, "y");
  const auto offset = maybe<float>(bias, "bias"), more = maybe<float>(plus, "plus");
  const std::int64_t k = panel.inputs();
  if (in.last() != k) in.fail("is " + in.text() + ", rows have " + std::to_string(k));
  const std::int64_t n = in.size() / k;
  if (out.last() != panel.rows || out.size() / panel.rows != n)
    out.fail("is " + out.text() + ", x is " + in.text());
  if (!in.dense() || !out.dense() || (more && !more->dense())) in.fail("or y or plus has gaps");
  const subbyte::Finish last = finish(offset, more, panel.rows, out, low, high);
  const subbyte::Precision precision = precision_of(planes);
  const subbyte::Kernels& tier = kernels_for(panel.readable(false));
  nb::gil_scoped_release released;
  return subbyte::linear(tier, panel, in.data(), n, out.data(), last, precision, threads);
}

// float32 x [n, channels, h, w], y and plus [n, out_channels, ...], bias [out_channels]; all of
// them lie as N H W C (`last`) or as N C H W.
Sizes conv2d(const subbyte::ConvPanels& weight, nb::handle x, nb::handle y, bool channels_last,
             nb::handle bias, nb::handle plus, float low, float high, int planes, int threads) {
  const Floats in(x, "x"), out(y, "y");
  const auto offset = maybe<float>(bias, "bias"), more = maybe<float>(plus, "plus");
  const subbyte::ConvShape& s = weight.shape();
  if (in.ndim() != 4 || in.size(1) != s.channels || !s.covers(in.size(2), in.size(3)))
    in.fail("is " + in.text() + ", which the convolution does not take");
  const std::int64_t n = in.size(0), h = in.size(2), w = in.size(3);
  if (out.ndim() != 4 || out.size(0) != n || out.size(1) != s.out_channels ||
      out.size(2) != s.out_h(h) || out.size(3) != s.out_w(w))
    out.fail("is " + out.text() + ", x is " + in.text());
  const auto lies = [&](const Floats& array) {
    return channels_last ? array.dense({0, 2, 3, 1}) : array.dense();
  };
  if (!lies(in) || !lies(out) || (more && !lies(*more))) in.fail("or y or plus has gaps");
  const subbyte::Finish done = finish(offset, more, s.out_channels, out, low, high);
  const subbyte::Precision precision = precision_of(planes);
  const subbyte::Kernels& tier = kernels_for(s.depthwise() || weight.panels()[0].readable(false));
  nb::gil_scoped_release released;
  return subbyte::conv2d(tier, weight, in.data(), n, h, w, out.data(), channels_last, done,
                         precision, threads);
}

// Layers: ReadyLinear or ReadyConv. versions: of words and scale, or nothing.
template <class Layers>
void define_ready(nb::module_& module, const char* name) {
  nb::class_<Layers>(module, name, "A layer's plain calls in one step.")
      .def(
          "__init__",
          [](Layers* self, nb::object panel, nb::object origin, nb::object words, nb::object scale,
             nb::object bias, const Sizes& versions) {
            require(versions.empty() || versions.size() == 2, "versions are two numbers, or none");
            new (self) Layers({panel, origin, words, scale, bias, versions});
          },
          nb::arg("panel"), nb::arg("origin"), nb::arg("words"), nb::arg("scale"),
          nb::arg("bias").none(), nb::arg("versions"))
      .def("holds", &Layers::holds, "Whether words and scales are what they were.")
      .def_prop_ro("stale", &Layers::stale, "Whether the last look said that they are not.")
      .def(
          "__call__",
          [](const Layers& self, nb::handle x, float low, float high, int planes, int threads) {
            return self.call(x, low, high, precision_of(planes), threads);
          },
          nb::arg("x"), nb::arg("low"), nb::arg("high"), nb::arg("planes"), nb::arg("threads"),
          "The product, or None if it must go elsewhere.");
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
      .def_prop_ro("k", &subbyte::Panel::inputs)
      .def_prop_ro("bytes", &subbyte::Panel::bytes)
      .def_prop_ro("bits", [](const subbyte::Panel& panel) { return panel.traits().bits(); })
      .def("linear", &linear, nb::arg("x"), nb::arg("y"), nb::arg("bias").none(),
           nb::arg("plus").none(), nb::arg("low"), nb::arg("high"), nb::arg("planes"),
           nb::arg("threads"));
  nb::class_<subbyte::ConvPanels>(module, "ConvPanels", "A convolution's weight, repacked.")
      .def_prop_ro("bytes", &subbyte::ConvPanels::bytes)
      .def("conv2d", &conv2d, nb::arg("x"), nb::arg("y"), nb::arg("last"), nb::arg("bias").none(),
           nb::arg("plus").none(), nb::arg("low"), nb::arg("high"), nb::arg("planes"),
           nb::arg("threads"));
  nb::class_<Origins>(module, "Origin", "What a panel was made of: words and scales.")
      .def(nb::init<nb::handle, nb::handle>(), nb::arg("words"), nb::arg("scale"))
      .def("same", &Origins::same, nb::arg("words"), nb::arg("scale"),
           "Whether these hold the same bytes.")
      .def("glance", &Origins::glance, nb::arg("words"), nb::arg("scale"),
           "The same, from a few of their blocks, at each call others.");
  define_ready<subbyte::ReadyLinear>(module, "ReadyLinear");
  define_ready<subbyte::ReadyConv>(module, "ReadyConv");
  module.def("make_conv", &make_conv, nb::arg("words"), nb::arg("levels"), nb::arg("digits"),
             nb::arg("sizes"), nb::arg("scale"), nb::arg("factor"), nb::arg("center"));
  module.def("make_panel_of_groups", &make_panel_of_groups, nb::arg("words"), nb::arg("levels"),
             nb::arg("digits"), nb::arg("rows"), nb::arg("row_length"), nb::arg("shared"),
             nb::arg("scale"), nb::arg("unit"), nb::arg("factor"), nb::arg("center"));
  module.def("make_panel", &make_panel, nb::arg("words"), nb::arg("levels"), nb::arg("digits"),
             nb::arg("first_row"), nb::arg("rows"), nb::arg("row_length"), nb::arg("order"),
             nb::arg("scale"), nb::arg("factor"), nb::arg("center"));
}
