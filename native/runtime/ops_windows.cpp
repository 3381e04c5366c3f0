// Convolutions with float weights, and pooling.
#include <cmath>
#include <limits>

#include "bytes.hpp"
#include "convs.hpp"

namespace subbyte::runtime {
namespace {

struct Operands {
  Value x, weight, bias;
};

// The result of a convolution whose geometry is known, plain or transposed.
void convolution(Op& op, const Geometry& g, const Operands& given, int dims,
                 decltype(&convolve) product) {
  if (given.bias.given() && given.bias.shape != Shape{g.out_channels})
    op.fail("the bias is " + text_of(given.bias.shape));
  const Value y = op.make(Dtype::kFloat32, result_of(g, given.x, dims));
  op.step(
      {given.x, given.weight, given.bias}, {y},
      [=](const Run& run) {
        product(g, run.in<float>(given.x), run.in<float>(given.weight),
                given.bias.given() ? run.in<float>(given.bias) : nullptr, given.x.shape[0],
                run.out<float>(y), run.threads);
      },
      "float32");
  op.result(y);
}

template <int Dims, bool Same>
void conv_operator(Op& op) {
  const Value x = op.floats("x"), weight = op.floats("weight"), bias = op.maybe_floats("bias");
  ConvSettings s =
      conv_settings(op, Dims, op.integer("group", 1), op.integers("strides", {1}),
                    Same ? Shape{0} : op.integers("pads", {0}), op.integers("dilations", {1}));
  if (weight.rank() != Dims + 2) op.fail("the weight is " + text_of(weight.shape));
  if (Same) {
    const std::string word = op.word("pads", "valid");
    if (word != "same" && word != "valid") op.fail("padding '" + shown(word) + "' is unknown");
    if (word == "same") pad_same(s, {weight.shape.begin() + 2, weight.shape.end()});
  }
  const Geometry g = geometry_of(op, s, x, weight.shape, false);
  convolution(op, g, {x, weight, bias}, Dims, convolve);
}

template <int Dims>
void transposed_operator(Op& op) {
  const Value x = op.floats("x"), weight = op.floats("weight"), bias = op.maybe_floats("bias");
  ConvSettings s = conv_settings(op, Dims, op.integer("group", 1), op.integers("strides", {1}),
                                 op.integers("pads", {0}), op.integers("dilations", {1}));
  s.extra = op.integers("output_padding", {0});
  if (s.extra.size() == 1) s.extra.resize(Dims, s.extra[0]);
  if (s.extra.size() != Dims) op.fail("output_padding is " + text_of(s.extra));
  for (int d = 0; d < Dims; ++d)
    if (s.extra[d] < 0 || s.extra[d] >= std::max(s.stride[d], s.dilation[d]))
      op.fail("output_padding is " + text_of(s.extra));
  const Geometry g = geometry_of(op, s, x, weight.shape, true);
  convolution(op, g, {x, weight, bias}, Dims, convolve_transposed);
}

// ---------------------------------------------------------------- pooling

struct Pool {
  Geometry g;
  std::int64_t planes = 0;
  std::array<std::int64_t, 3> after{0, 0, 0};
};

// x [..., sizes]: the last `dims` dimensions are pooled.
Pool pool_of(Op& op, const Value& x, int dims, Shape& shape) {
  if (x.rank() != dims + 1 && x.rank() != dims + 2) op.fail("x is " + text_of(x.shape));
  const auto sizes = [&](const char* name, const Shape& otherwise) {
    Shape found = op.integers(name, otherwise);
    if (found.empty()) found = otherwise;
    if (found.size() == 1) found.resize(dims, found[0]);
    if (static_cast<int>(found.size()) != dims)
      op.fail(std::string(name) + " is " + text_of(found));
    return found;
  };
  const Shape kernel = sizes("kernel_shape", {});
  const Shape stride = sizes("strides", kernel), pads = sizes("pads", {0});
  const Shape dilation = sizes("dilations", {1});
  const bool ceil = op.flag("ceil_mode", false);
  Pool pool;
  shape = x.shape;
  pool.planes = 1;
  for (int d = 0; d < x.rank() - dims; ++d) pool.planes *= x.shape[d];
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  for (int d = 0; d < dims; ++d) {
    const int place = 3 - dims + d, at = x.rank() - dims + d;
    const std::int64_t size = x.shape[at];
    const bool good = kernel[d] >= 1 && kernel[d] < kMost && stride[d] >= 1 && stride[d] < kMost &&
                      dilation[d] >= 1 && dilation[d] < kMost && pads[d] >= 0 &&
                      pads[d] <= kernel[d] / 2 && size >= 1;
    if (!good) op.fail("x is " + text_of(x.shape) + ", the window " + text_of(kernel));
    const std::int64_t room = size + 2 * pads[d] - dilation[d] * (kernel[d] - 1) - 1;
    std::int64_t out = room < 0 ? 0 : (room + (ceil ? stride[d] - 1 : 0)) / stride[d] + 1;
    if (ceil && (out - 1) * stride[d] >= size + pads[d]) --out;
    if (out < 1)
      op.fail("x is " + text_of(x.shape) + ", smaller than the window " + text_of(kernel));
    pool.g.in[place] = size, pool.g.out[place] = out, pool.g.kernel[place] = kernel[d];
    pool.g.stride[place] = stride[d], pool.g.dilation[place] = dilation[d];
    pool.g.before[place] = pads[d];
    shape[at] = out;
  }
  return pool;
}

// The first tap within [0, in) and the one behind the last, from `start` on.
void inside(std::int64_t start, std::int64_t kernel, std::int64_t dilation, std::int64_t in,
            std::int64_t& first, std::int64_t& last) {
  first = start < 0 ? (-start + dilation - 1) / dilation : 0;
  last = in > start ? std::min(kernel, (in - 1 - start) / dilation + 1) : 0;
}

// f(plane, out index, first [3], last [3], start [3]) for every window.
template <class F>
void for_windows(const Pool& pool, int threads, F&& f) {
  const Geometry& g = pool.g;
  spread(threads, pool.planes, g.out_values() * g.taps(),
         [&](std::int64_t begin, std::int64_t end) {
           std::array<std::int64_t, 3> first, last, start;
           for (std::int64_t plane = begin; plane < end; ++plane)
             for (std::int64_t i = 0; i < g.out_values(); ++i) {
               const std::int64_t at[3] = {i / (g.out[1] * g.out[2]), i / g.out[2] % g.out[1],
                                           i % g.out[2]};
               for (int d = 0; d < 3; ++d) {
                 start[d] = at[d] * g.stride[d] - g.before[d];
                 inside(start[d], g.kernel[d], g.dilation[d], g.in[d], first[d], last[d]);
               }
               f(plane, i, first, last, start);
             }
         });
}

// g(value) for the values of a window.
template <class F>
void for_values(const Geometry& g, const float* x, const std::array<std::int64_t, 3>& first,
                const std::array<std::int64_t, 3>& last, const std::array<std::int64_t, 3>& start,
                F&& f) {
  for (std::int64_t a = first[0]; a < last[0]; ++a)
    for (std::int64_t b = first[1]; b < last[1]; ++b) {
      const float* row =
          x + ((start[0] + a * g.dilation[0]) * g.in[1] + start[1] + b * g.dilation[1]) * g.in[2];
      for (std::int64_t c = first[2]; c < last[2]; ++c) f(row[start[2] + c * g.dilation[2]]);
    }
}

// The window of place i of the result of an image.
struct Window {
  std::array<std::int64_t, 3> first, last, start;

  Window(const Geometry& g, std::int64_t i) {
    const std::int64_t at[3] = {i / (g.out[1] * g.out[2]), i / g.out[2] % g.out[1], i % g.out[2]};
    for (int d = 0; d < 3; ++d) {
      start[d] = at[d] * g.stride[d] - g.before[d];
      inside(start[d], g.kernel[d], g.dilation[d], g.in[d], first[d], last[d]);
    }
  }
};

// f(result [channels], window, pixel) for every pixel of the result of images of bytes, where
// pixel(y, x) is what lies there, [channels].
template <class F>
void for_pixels(const Pool& pool, const Value& x, const Value& y, const Run& run, F&& f) {
  const Geometry& g = pool.g;
  const std::int64_t channels = x.shape[1], out = g.out_values();
  const std::uint8_t* in = run.in<std::uint8_t>(x);
  std::uint8_t* to = run.out<std::uint8_t>(y);
  spread(run.threads, x.shape[0] * out, channels * g.taps(),
         [&](std::int64_t begin, std::int64_t end) {
           for (std::int64_t i = begin; i < end; ++i) {
             const std::uint8_t* image = in + i / out * g.in_values() * channels;
             f(to + i * channels, Window(g, i % out), [=](std::int64_t row, std::int64_t column) {
               return image + (row * g.in[2] + column) * channels;
             });
           }
         });
}

// g(pixel) for the pixels of a window.
template <class P, class F>
void for_window(const Geometry& g, const Window& window, P&& pixel, F&& f) {
  for (std::int64_t a = window.first[1]; a < window.last[1]; ++a)
    for (std::int64_t b = window.first[2]; b < window.last[2]; ++b)
      f(pixel(window.start[1] + a * g.dilation[1], window.start[2] + b * g.dilation[2]));
}

// most[c] = max(most[c], value[c]).
void take_larger(const std::uint8_t* value, std::int64_t n, std::uint8_t* most) {
  for (std::int64_t c = 0; c < n; ++c) most[c] = value[c] > most[c] ? value[c] : most[c];
}

void max_pool_bytes(Op& op, const Value& x) {
  Shape shape;
  const Pool pool = pool_of(op, x, 2, shape);
  const Value y = op.make_bytes(shape, x.scale);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const std::int64_t channels = x.shape[1];
        for_pixels(pool, x, y, run, [&](std::uint8_t* most, const Window& window, auto&& pixel) {
          std::fill_n(most, channels, 0);
          for_window(pool.g, window, pixel,
                     [&](const std::uint8_t* value) { take_larger(value, channels, most); });
        });
      },
      kStatic);
  op.result(y);
}

// NaN stays.
inline float larger(float x, float y) { return x > y || x != x ? x : y; }

template <int Dims>
void max_pool(Op& op) {
  if constexpr (Dims == 2)
    if (const Value bytes = op.bytes("x"); bytes.rank() == 4) return max_pool_bytes(op, bytes);
  const Value x = op.floats("x");
  Shape shape;
  const Pool pool = pool_of(op, x, Dims, shape);
  const Value y = op.make(Dtype::kFloat32, shape);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const float* in = run.in<float>(x);
        float* out = run.out<float>(y);
        const Geometry& g = pool.g;
        const std::int64_t n = g.out_values(), step = g.stride[2];
        spread(run.threads, pool.planes, n * g.taps(), [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t plane = begin; plane < end; ++plane) {
            const float* image = in + plane * g.in_values();
            float* most = out + plane * n;
            std::fill_n(most, n, -std::numeric_limits<float>::infinity());
            for_runs(g, g.in, g.out,
                     [&](std::int64_t, std::int64_t from, std::int64_t to, std::int64_t count) {
                       const float* x = image + from;
                       float* y = most + to;
                       if (step == 2)  // for the compiler: this one it can do in vectors
                         for (std::int64_t k = 0; k < count; ++k) y[k] = larger(x[2 * k], y[k]);
                       else
                         for (std::int64_t k = 0; k < count; ++k) y[k] = larger(x[k * step], y[k]);
                     });
          }
        });
      },
      "float32");
  op.result(y);
}

// What the sum of a window is divided by.
struct Divisor {
  bool padding;
  std::int64_t given;

  explicit Divisor(Op& op)
      : padding(op.flag("count_include_pad", true)), given(op.integer("divisor_override", 0)) {
    if (given < 0) op.fail("divisor_override is " + std::to_string(given));
  }
  template <class Places>
  float of(const Geometry& g, int dims, const Places& first, const Places& last,
           const Places& start) const {
    std::int64_t count = 1;
    for (int d = 3 - dims; d < 3; ++d) {
      const std::int64_t end = std::min(start[d] + g.kernel[d], g.in[d] + g.before[d]);
      count *= padding ? end - start[d] : last[d] - first[d];
    }
    return static_cast<float>(given ? given : count);
  }
};

// round(sum * (x's scale / y's) / divisor), in float32 from left to right.
void average_pool_bytes(Op& op, const Value& x, ByteScale scale) {
  Shape shape;
  const Pool pool = pool_of(op, x, 2, shape);
  const Divisor divisor(op);
  const Value y = op.make_bytes(shape, scale);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const std::int64_t channels = x.shape[1];
        const float factor = x.scale.scale * (1.0f / scale.scale);
        for_pixels(pool, x, y, run, [&](std::uint8_t* out, const Window& window, auto&& pixel) {
          thread_local std::vector<std::int32_t> sums;
          sums.assign(channels, 0);
          for_window(pool.g, window, pixel, [&](const std::uint8_t* value) {
            for (std::int64_t c = 0; c < channels; ++c) sums[c] += value[c] - x.scale.zero;
          });
          const float count = divisor.of(pool.g, 2, window.first, window.last, window.start);
          for (std::int64_t c = 0; c < channels; ++c)
            out[c] = rounded(static_cast<float>(sums[c]) * factor / count, 1.0f, scale);
        });
      },
      kStatic);
  op.result(y);
}

template <int Dims>
void average_pool(Op& op) {
  if constexpr (Dims == 2)
    if (const Value bytes = op.bytes("x"); bytes.rank() == 4 && op.result_scale())
      return average_pool_bytes(op, bytes, *op.result_scale());
  const Value x = op.floats("x");
  Shape shape;
  const Pool pool = pool_of(op, x, Dims, shape);
  const Divisor divisor(op);
  const Value y = op.make(Dtype::kFloat32, shape);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const float* in = run.in<float>(x);
        float* out = run.out<float>(y);
        const Geometry& g = pool.g;
        for_windows(pool, run.threads,
                    [&](std::int64_t plane, std::int64_t i, const auto& first, const auto& last,
                        const auto& start) {
                      float sum = 0.0f;
                      for_values(g, in + plane * g.in_values(), first, last, start,
                                 [&](float value) { sum += value; });
                      out[plane * g.out_values() + i] =
                          sum / divisor.of(g, Dims, first, last, start);
                    });
      },
      "float32");
  op.result(y);
}

// Whether an output size is 1 in every dimension.
bool is_one(const Arg& size) {
  if (size.kind == Arg::Kind::kInteger) return size.integer == 1;
  return !size.list.empty() && std::all_of(size.list.begin(), size.list.end(), is_one);
}

template <int Dims>
void adaptive_average(Op& op) {
  const Value bytes = op.bytes("x");
  if (Dims == 2 && bytes.rank() == 4 && is_one(op.arg("output_size"))) {
    const Value mean = mean_of_images(op, bytes);
    return op.result(op.view(mean, {bytes.shape[0], bytes.shape[1], 1, 1}));
  }
  const Value x = op.floats("x");
  const Arg sizes = op.arg("output_size");
  if (x.rank() != Dims + 1 && x.rank() != Dims + 2) op.fail("x is " + text_of(x.shape));
  Shape shape = x.shape;
  std::array<std::int64_t, 3> in{1, 1, 1}, out{1, 1, 1};
  std::int64_t planes = 1;
  for (int d = 0; d < x.rank() - Dims; ++d) planes *= x.shape[d];
  for (int d = 0; d < Dims; ++d) {
    const int at = x.rank() - Dims + d;
    const Arg& own =
        sizes.kind == Arg::Kind::kList && sizes.list.size() == Dims ? sizes.list[d] : sizes;
    if (own.kind == Arg::Kind::kInteger)
      shape[at] = own.integer;
    else if (own.kind != Arg::Kind::kNone)
      op.fail("output_size is malformed");
    in[3 - Dims + d] = x.shape[at], out[3 - Dims + d] = shape[at];
    if (x.shape[at] < 1 || shape[at] < 1 || shape[at] > std::int64_t{1} << 31)
      op.fail("x is " + text_of(x.shape) + ", the result " + text_of(shape));
  }
  const Value y = op.make(Dtype::kFloat32, shape);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const float* from = run.in<float>(x);
        float* to = run.out<float>(y);
        const std::int64_t n = in[0] * in[1] * in[2], m = out[0] * out[1] * out[2];
        const auto low = [](std::int64_t i, std::int64_t of, std::int64_t size) {
          return i * size / of;
        };
        const auto high = [](std::int64_t i, std::int64_t of, std::int64_t size) {
          return ((i + 1) * size + of - 1) / of;
        };
        spread(run.threads, planes, n, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin * m; i < end * m; ++i) {
            const std::int64_t b = i / out[2] % out[1], c = i % out[2];
            const std::int64_t top = low(b, out[1], in[1]), bottom = high(b, out[1], in[1]);
            const std::int64_t left = low(c, out[2], in[2]), right = high(c, out[2], in[2]);
            double sum = 0.0;
            for (std::int64_t row = top; row < bottom; ++row)
              for (std::int64_t column = left; column < right; ++column)
                sum += from[i / m * n + row * in[2] + column];
            to[i] = static_cast<float>(sum / static_cast<double>((bottom - top) * (right - left)));
          }
        });
      },
      "float32");
  op.result(y);
}

}  // namespace

Operators window_operators() {
  return {{"Conv1d", conv_operator<1, false>},
          {"Conv2d", conv_operator<2, false>},
          {"Conv3d", conv_operator<3, false>},
          {"Conv1dSame", conv_operator<1, true>},
          {"Conv2dSame", conv_operator<2, true>},
          {"ConvTranspose1d", transposed_operator<1>},
          {"ConvTranspose2d", transposed_operator<2>},
          {"ConvTranspose3d", transposed_operator<3>},
          {"MaxPool1d", max_pool<1>},
          {"MaxPool2d", max_pool<2>},
          {"MaxPool3d", max_pool<3>},
          {"AveragePool1d", average_pool<1>},
          {"AveragePool2d", average_pool<2>},
          {"AdaptiveAveragePool1d", adaptive_average<1>},
          {"AdaptiveAveragePool2d", adaptive_average<2>}};
}

}  // namespace subbyte::runtime
