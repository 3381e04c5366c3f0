// "Layer": packed layers, and norms that a program calls whole.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "bytes.hpp"
#include "convs.hpp"
#include "dispatch.hpp"
#include "linear.hpp"
#include "math.hpp"
#include "norms.hpp"
#include "op.hpp"

namespace subbyte::runtime {
namespace {

using Kind = Json::Kind;

constexpr std::int64_t kFewChannels = 8;  // of a group: the kernels have 32 rows

struct Limits {
  float low = -std::numeric_limits<float>::infinity();
  float high = std::numeric_limits<float>::infinity();
};

Limits activation_of(Op& op) {
  const Json* word = op.settings().find("activation");
  if (!word || word->text == "none") return {};
  if (word->text == "relu") return {0.0f, std::numeric_limits<float>::infinity()};
  if (word->text == "relu6") return {0.0f, 6.0f};
  op.fail("activation '" + shown(word->text) + "' is unknown");
}

// activation(y + plus) in place; NaN stays.
void finish(float* y, const float* plus, std::int64_t n, const Limits& limits) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float sum = plus ? y[i] + plus[i] : y[i];
    const float low = sum < limits.low ? limits.low : sum;
    y[i] = low > limits.high ? limits.high : low;
  }
}

const Packed& packed_of(Op& op, const std::string& name) {
  const Packed* found = op.packed(name);
  if (!found) op.fail("the file has no packed layer '" + shown(name) + "'");
  return *found;
}

// The layer's own bias: a layer that uses another's weight has its in the state.
Value bias_of(Op& op, const Packed& packed, std::int64_t rows) {
  const std::string name = op.layer().empty() ? "bias" : op.layer() + ".bias";
  Value bias = op.maybe_state(name);
  if (!bias.given() && packed.bias().empty()) return {};
  if (!bias.given())
    bias = op.constant_floats(packed.bias(), {static_cast<std::int64_t>(packed.bias().size())});
  if (bias.dtype != Dtype::kFloat32 || bias.shape != Shape{rows})
    op.fail("the bias is " + text_of(bias.shape));
  return bias;
}

const char* how(Precision precision) {
  return precision == Precision::kFloat32 ? "float32"
         : precision == Precision::kInt16 ? "int16"
                                          : "int8";
}

Finish finish_of(const float* bias, const float* plus, const Limits& limits) {
  Finish found;
  found.bias = bias, found.plus = plus, found.low = limits.low, found.high = limits.high;
  return found;
}

// The sum of two tensors of one shape, where both are given.
Value sum_of(Op& op, const Value& a, const Value& b) {
  if (!a.given() || !b.given()) return a.given() ? a : b;
  const Value sum = op.make(Dtype::kFloat32, a.shape);
  op.step({a, b}, {sum}, [a, b, sum](const Run& run) {
    const float *x = run.in<float>(a), *y = run.in<float>(b);
    float* out = run.out<float>(sum);
    for (std::int64_t i = 0, n = sum.count(); i < n; ++i) out[i] = x[i] + y[i];
  });
  return sum;
}

Value plus_of(Op& op, const Shape& shape) {
  const Value plus = op.maybe_floats("plus");
  if (plus.given() && plus.shape != shape)
    op.fail("'plus' is " + text_of(plus.shape) + ", the result " + text_of(shape));
  return plus;
}

}  // namespace

// x [..., in] times a packed weight [out, in], by the kernels where they serve it.
Value packed_linear(Op& op, const Value& x, const Packed& packed, const Value& bias,
                    const Value& plus, const Limits& limits) {
  const std::int64_t rows = packed.rows(), k = packed.shape()[1], n = k ? x.count() / k : 0;
  Shape shape = x.shape;
  shape.back() = rows;
  const Value y = op.make(Dtype::kFloat32, shape);
  if (!packed.served(k)) {
    const auto weight = std::make_shared<std::vector<float>>(packed.decoded(true));
    op.step(
        {x, bias, plus}, {y},
        [=](const Run& run) {
          multiply_rows(run.in<float>(x), weight->data(),
                        bias.given() ? run.in<float>(bias) : nullptr, n, rows, k, run.out<float>(y),
                        run.threads);
          finish(run.out<float>(y), plus.given() ? run.in<float>(plus) : nullptr, n * rows, limits);
        },
        "float32, decoded");
    return y;
  }
  Value more = plus;
  if (packed.rank()) {
    if (static_cast<std::int64_t>(packed.down().size()) != packed.rank() * k)
      op.fail("the adapter does not fit its weight");
    const Value inner = op.make(Dtype::kFloat32, {n, packed.rank()});
    const Value extra = op.make(Dtype::kFloat32, shape);
    op.step(
        {x}, {inner, extra},
        [=, &packed](const Run& run) {
          multiply_rows(run.in<float>(x), packed.down().data(), nullptr, n, packed.rank(), k,
                        run.out<float>(inner), run.threads);
          multiply_rows(run.in<float>(inner), packed.up().data(), nullptr, n, rows, packed.rank(),
                        run.out<float>(extra), run.threads);
        },
        "float32, adapter");
    more = sum_of(op, plus, extra);
  }
  const Panel& panel = packed.panel();
  const Precision precision = op.precision();
  op.step(
      {x, bias, more}, {y},
      [=, &panel, &packed](const Run& run) {
        const float *in = run.in<float>(x), *shift = bias.given() ? run.in<float>(bias) : nullptr;
        const float* side = more.given() ? run.in<float>(more) : nullptr;
        float* out = run.out<float>(y);
        const auto odd = linear(kernels(), panel, in, n, out, finish_of(shift, side, limits),
                                precision, run.threads);
        if (odd.empty()) return;
        const std::vector<float> weight = packed.decoded(false);
        for (const std::int64_t i : odd) {
          multiply_rows(in + i * k, weight.data(), shift, 1, rows, k, out + i * rows, run.threads);
          finish(out + i * rows, side ? side + i * rows : nullptr, rows, limits);
        }
      },
      how(precision));
  return y;
}

namespace {

// Rows in bytes times a packed weight, to float32.
bool linear_of_bytes(Op& op) {
  const Value x = op.bytes("x");
  const Packed& packed = packed_of(op, op.layer());
  const Shape& weight = packed.shape();
  if (!x.rank() || x.rank() == 4 || weight.size() != 2 || x.shape.back() != weight[1] ||
      packed.by_groups() || packed.rank() || !packed.served(weight[1]))
    return false;
  Shape shape = x.shape;
  shape.back() = packed.rows();
  const Value bias = bias_of(op, packed, packed.rows()), plus = plus_of(op, shape);
  const Limits limits = activation_of(op);
  const Value y = op.make(Dtype::kFloat32, shape);
  const Panel& panel = packed.panel();
  const std::int64_t n = x.count() / weight[1];
  op.step(
      {x, bias, plus}, {y},
      [=, &panel](const Run& run) {
        const Finish last = finish_of(bias.given() ? run.in<float>(bias) : nullptr,
                                      plus.given() ? run.in<float>(plus) : nullptr, limits);
        linear(kernels(), panel, run.in<std::uint8_t>(x), x.scale, n, run.out<float>(y), last,
               run.threads);
      },
      kStatic);
  op.result(y);
  return true;
}

void linear_layer(Op& op) {
  if (linear_of_bytes(op)) return;
  const Value x = op.floats("x");
  const Packed& packed = packed_of(op, op.layer());
  if (packed.shape().size() != 2 || !x.rank() || x.shape.back() != packed.shape()[1])
    op.fail("x is " + text_of(x.shape) + ", the weight " + text_of(packed.shape()));
  Shape shape = x.shape;
  shape.back() = packed.rows();
  op.result(packed_linear(op, x, packed, bias_of(op, packed, packed.rows()), plus_of(op, shape),
                          activation_of(op)));
}

Shape sizes_at(Op& op, const char* key) {
  const Json* value = op.settings().find(key);
  Shape found;
  if (value && value->is(Kind::kInteger)) return {value->integer};
  if (!value || !value->is(Kind::kList)) op.fail(std::string("'") + key + "' is no list of sizes");
  for (const Json& item : value->items) {
    if (!item.is(Kind::kInteger)) op.fail(std::string("'") + key + "' is no list of sizes");
    found.push_back(item.integer);
  }
  return found;
}

// The settings of a convolution's layer.
ConvSettings settings_of(Op& op, int dims, const Shape& weight) {
  const Json* padding = op.settings().find("padding");
  const bool words = padding && padding->is(Kind::kText);
  ConvSettings s = conv_settings(op, dims, op.settings().at("groups", Kind::kInteger).integer,
                                 sizes_at(op, "stride"), words ? Shape{0} : sizes_at(op, "padding"),
                                 sizes_at(op, "dilation"));
  if (words && padding->text != "same" && padding->text != "valid")
    op.fail("padding '" + shown(padding->text) + "' is unknown");
  if (words && padding->text == "same") pad_same(s, {weight.begin() + 2, weight.end()});
  return s;
}

// What the adapter adds to a convolution's products.
Value adapted(Op& op, const Value& x, const Packed& packed, const Geometry& g, const Shape& shape) {
  Geometry narrow = g;
  narrow.out_channels = static_cast<std::int64_t>(packed.down().size()) /
                        std::max<std::int64_t>(1, g.channels / g.groups * g.taps());
  if (narrow.out_channels != packed.rank() * g.groups) op.fail("the adapter fits no groups");
  const std::int64_t n = x.shape[0], values = g.out_values(), rank = packed.rank();
  const Value inner = op.make(Dtype::kFloat32, {n, narrow.out_channels, values});
  const Value extra = op.make(Dtype::kFloat32, shape);
  op.step(
      {x}, {inner, extra},
      [=, &packed](const Run& run) {
        convolve(narrow, run.in<float>(x), packed.down().data(), nullptr, n, run.out<float>(inner),
                 run.threads);
        Geometry wide;
        wide.channels = rank * g.groups, wide.out_channels = g.out_channels, wide.groups = g.groups;
        wide.in[2] = wide.out[2] = values;
        convolve(wide, run.in<float>(inner), packed.up().data(), nullptr, n, run.out<float>(extra),
                 run.threads);
      },
      "float32, adapter");
  return extra;
}

ConvShape shape_of(const ConvSettings& s, const Geometry& g) {
  return {g.channels,   g.out_channels, g.kernel[1],   g.kernel[2],  g.stride[1],
          g.stride[2],  g.dilation[1],  g.dilation[2], s.padding[0], s.after[0],
          s.padding[1], s.after[1],     g.groups};
}

// What a convolution that gives bytes works on. x and plus: floats or bytes; plus and bias may be
// missing.
struct ToBytes {
  Value x, plus, bias, y;
  Geometry g;
  Limits limits;

  const float* shift(const Run& run) const { return bias.given() ? run.in<float>(bias) : nullptr; }
  Images images(const Run& run) const {
    if (x.in_bytes()) return {nullptr, false, run.in<std::uint8_t>(x), x.scale};
    return {run.in<float>(x), false, nullptr, {}};
  }
  Target target(const Run& run) const {
    const std::uint8_t* more = plus.given() ? run.in<std::uint8_t>(plus) : nullptr;
    return {nullptr, false, run.out<std::uint8_t>(y), y.scale, more, plus.scale};
  }

  // An image of floats that has no scale, in float32.
  void compute(const Run& run, const Packed& packed, std::int64_t image) const {
    const std::int64_t in = g.channels * g.in_values(), out = g.out_channels * g.out_values();
    const std::vector<float> weight = packed.decoded(false);
    std::vector<float> values(out);
    convolve(g, run.in<float>(x) + image * in, weight.data(), shift(run), 1, values.data(),
             run.threads);
    for (std::int64_t c = 0; plus.given() && c < g.out_channels; ++c)
      for (std::int64_t p = 0; p < g.out_values(); ++p)
        values[c * g.out_values() + p] +=
            static_cast<float>(run.in<std::uint8_t>(plus)[image * out + p * g.out_channels + c] -
                               plus.scale.zero) *
            plus.scale.scale;
    finish(values.data(), nullptr, out, limits);
    bytes_from_floats(values.data(), 1, y, run.out<std::uint8_t>(y) + image * out, run.threads);
  }
};

void conv_to_bytes(Op& op, const ToBytes& own, const Packed& packed, const ConvPanels& panels) {
  op.step(
      {own.x, own.bias, own.plus}, {own.y},
      [=, &panels, &packed](const Run& run) {
        const auto odd =
            conv2d(kernels(), panels, own.images(run), own.x.shape[0], own.g.in[1], own.g.in[2],
                   own.target(run), finish_of(own.shift(run), nullptr, own.limits),
                   Precision::kInt8, run.threads);
        for (const std::int64_t image : odd) own.compute(run, packed, image);
      },
      own.x.in_bytes() ? kStatic : "int8, to static scales");
  op.result(own.y);
}

// Whether the result, and the sum with `plus`, can be in bytes.
bool gives_bytes(Op& op, const Value& x, const Packed& packed, bool depthwise) {
  if (!op.result_scale() || packed.rank() || (depthwise && !x.in_bytes())) return false;
  return !op.has("plus") || op.bytes("plus").rank() == 4;
}

void conv_by_kernels(Op& op, const Value& given, const Packed& packed, const ConvSettings& s,
                     const Geometry& g, const Value& bias) {
  const ConvPanels& panels = packed.conv(shape_of(s, g));
  const Shape shape = result_of(g, given, 2);
  const bool depthwise = panels.shape().depthwise();
  if (gives_bytes(op, given, packed, depthwise)) {
    const Value plus = op.bytes("plus"), y = op.make_bytes(shape, *op.result_scale());
    if (plus.given() && plus.shape != shape)
      op.fail("'plus' is " + text_of(plus.shape) + ", the result " + text_of(shape));
    return conv_to_bytes(op, {given, plus, bias, y, g, activation_of(op)}, packed, panels);
  }
  const bool in_bytes = given.in_bytes() && !depthwise && !packed.rank();
  const Value x = in_bytes ? given : op.floats("x");
  const Value extra = packed.rank() ? adapted(op, x, packed, g, shape) : Value{};
  const Value plus = sum_of(op, plus_of(op, shape), extra);
  const Value y = op.make(Dtype::kFloat32, shape);
  const Limits limits = activation_of(op);
  const Precision precision = op.precision();
  const std::int64_t n = x.shape[0], in = g.channels * g.in_values();
  const std::int64_t out = g.out_channels * g.out_values();
  op.step(
      {x, bias, plus}, {y},
      [=, &panels, &packed](const Run& run) {
        const float* image = in_bytes ? nullptr : run.in<float>(x);
        const std::uint8_t* bytes = in_bytes ? run.in<std::uint8_t>(x) : nullptr;
        const float* shift = bias.given() ? run.in<float>(bias) : nullptr;
        const float* side = plus.given() ? run.in<float>(plus) : nullptr;
        float* to = run.out<float>(y);
        const auto odd = conv2d(kernels(), panels, Images{image, false, bytes, x.scale}, n, g.in[1],
                                g.in[2], Target{to, false, nullptr, {}, nullptr, {}},
                                finish_of(shift, side, limits), precision, run.threads);
        if (odd.empty()) return;
        const std::vector<float> weight = packed.decoded(false);
        for (const std::int64_t i : odd) {
          convolve(g, image + i * in, weight.data(), shift, 1, to + i * out, run.threads);
          finish(to + i * out, side ? side + i * out : nullptr, out, limits);
        }
      },
      depthwise  ? "float32"
      : in_bytes ? kStatic
                 : how(precision));
  op.result(op.result_scale() ? to_bytes(op, y, *op.result_scale()) : y);
}

void conv_layer(Op& op, int dims) {
  const Json* mode = op.settings().find("padding_mode");
  const bool zeros = !mode || mode->text == "zeros";
  Value x = dims == 2 && zeros ? op.bytes("x") : Value{};
  if (!x.given()) x = op.floats("x");
  const Packed& packed = packed_of(op, op.layer());
  const Shape weight = packed.shape();
  if (static_cast<int>(weight.size()) != dims + 2) op.fail("the weight is " + text_of(weight));
  ConvSettings s = settings_of(op, dims, weight);
  if (!zeros) {
    Shape pads;
    for (int d = dims; d-- > 0;) pads.push_back(s.padding[d]), pads.push_back(s.after[d]);
    x = padded(op, x, pads, mode->text, 0.0);
    s.padding.assign(dims, 0), s.after.assign(dims, 0);
  }
  const Geometry g = geometry_of(op, s, x, weight, false);
  const Value bias = bias_of(op, packed, g.out_channels);
  const std::int64_t of_group = g.out_channels / g.groups;
  const bool depthwise = g.channels == g.groups && g.out_channels == g.channels;
  const std::int64_t length = g.channels / g.groups * g.taps();
  if (dims == 2 && zeros && !packed.by_groups() && (of_group >= kFewChannels || depthwise) &&
      packed.served(length))
    return conv_by_kernels(op, x, packed, s, g, bias);
  x = x.in_bytes() ? op.floats("x") : x;
  const auto decoded = std::make_shared<std::vector<float>>(packed.decoded(true));
  const Shape shape = result_of(g, x, dims);
  const Value y = op.make(Dtype::kFloat32, shape);
  const Value plus = plus_of(op, shape);
  const Limits limits = activation_of(op);
  op.step(
      {x, bias, plus}, {y},
      [=](const Run& run) {
        convolve(g, run.in<float>(x), decoded->data(), bias.given() ? run.in<float>(bias) : nullptr,
                 x.shape[0], run.out<float>(y), run.threads);
        finish(run.out<float>(y), plus.given() ? run.in<float>(plus) : nullptr, y.count(), limits);
      },
      "float32, decoded");
  op.result(y);
}

void transposed_layer(Op& op, int dims) {
  const Value x = op.floats("x");
  const Packed& packed = packed_of(op, op.layer());
  ConvSettings s =
      conv_settings(op, dims, op.settings().at("groups", Kind::kInteger).integer,
                    sizes_at(op, "stride"), sizes_at(op, "padding"), sizes_at(op, "dilation"));
  s.extra = sizes_at(op, "output_padding");
  if (s.extra.size() == 1) s.extra.resize(dims, s.extra[0]);
  if (static_cast<int>(s.extra.size()) != dims) op.fail("output_padding is malformed");
  for (int d = 0; d < dims; ++d)
    if (s.extra[d] < 0 || s.extra[d] >= std::max(s.stride[d], s.dilation[d]))
      op.fail("output_padding is " + text_of(s.extra));
  const Geometry g = geometry_of(op, s, x, packed.shape(), true);
  const Value bias = bias_of(op, packed, g.out_channels);
  const auto decoded = std::make_shared<std::vector<float>>(packed.decoded(true, 1));
  const Value y = op.make(Dtype::kFloat32, result_of(g, x, dims));
  op.step(
      {x, bias}, {y},
      [=](const Run& run) {
        convolve_transposed(g, run.in<float>(x), decoded->data(),
                            bias.given() ? run.in<float>(bias) : nullptr, x.shape[0],
                            run.out<float>(y), run.threads);
      },
      "float32, decoded");
  op.result(y);
}

void embedding_layer(Op& op) {
  const Value x = op.in("x");
  const Packed& packed = packed_of(op, op.layer());
  if (x.dtype != Dtype::kInt64 && x.dtype != Dtype::kInt32) op.fail("indices are no whole numbers");
  if (packed.shape().size() != 2) op.fail("the table is " + text_of(packed.shape()));
  if (static_cast<std::int64_t>(packed.down().size()) != packed.rank() * packed.shape()[1])
    op.fail("the adapter does not fit its table");
  Shape shape = x.shape;
  const std::int64_t entries = packed.rows(), width = packed.shape()[1];
  shape.push_back(width);
  const Value y = op.make(Dtype::kFloat32, shape);
  op.step(
      {x}, {y},
      [=, &packed](const Run& run) {
        for (std::int64_t i = 0, n = x.count(); i < n; ++i) {
          const std::int64_t row =
              x.dtype == Dtype::kInt64 ? run.in<std::int64_t>(x)[i] : run.in<std::int32_t>(x)[i];
          if (row < 0 || row >= entries)
            throw Error("index " + std::to_string(row) + " is none of a table of " +
                        std::to_string(entries));
          packed.decode_row(row, run.out<float>(y) + i * width);
        }
      },
      "float32, decoded");
  op.result(y);
}

void norm_layer(Op& op) {
  const Value x = op.floats("x");
  if (x.rank() < 2) op.fail("x is " + text_of(x.shape));
  const std::string before = op.layer().empty() ? "" : op.layer() + ".";
  if (op.absorbed(op.layer()))
    return op.result(
        affine(op, x, op.state(before + "scale"), op.state(before + "shift"), x.shape[1]));
  const Json& eps = op.settings().at("eps", Kind::kReal);
  op.result(batch_norm(op, x,
                       {op.maybe_state(before + "weight"), op.maybe_state(before + "bias"),
                        op.state(before + "running_mean"), op.state(before + "running_var")},
                       eps.real));
}

void layer(Op& op) {
  const std::string& type = op.settings().at("type", Kind::kText).text;
  if (type == "Linear") return linear_layer(op);
  if (type == "Embedding") return embedding_layer(op);
  if (type == "MultiheadAttention") return attention_layer(op);
  for (int dims = 1; dims <= 3; ++dims) {
    const std::string end = std::to_string(dims) + "d";
    if (type == "Conv" + end) return conv_layer(op, dims);
    if (type == "ConvTranspose" + end) return transposed_layer(op, dims);
    if (type == "BatchNorm" + end) return norm_layer(op);
  }
  op.fail("layers of type '" + shown(type) + "' do not run");
}

}  // namespace

Value packed_linear(Op& op, const Value& x, const Packed& packed, const Value& bias) {
  return packed_linear(op, x, packed, bias, {}, {});
}

Value packed_layer(Op& op, const Value& x, const std::string& name, const Packed& packed) {
  Value bias = op.maybe_state(name + ".bias");
  if (!bias.given() && !packed.bias().empty())
    bias = op.constant_floats(packed.bias(), {static_cast<std::int64_t>(packed.bias().size())});
  if (packed.shape().size() != 2 || x.shape.back() != packed.shape()[1])
    op.fail("x is " + text_of(x.shape) + ", the weight " + text_of(packed.shape()));
  if (bias.given() && (bias.dtype != Dtype::kFloat32 || bias.shape != Shape{packed.rows()}))
    op.fail("the bias is " + text_of(bias.shape));
  return packed_linear(op, x, packed, bias, {}, {});
}

Operators layer_operators() { return {{"Layer", layer}}; }

}  // namespace subbyte::runtime
