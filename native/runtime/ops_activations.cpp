// Functions of one float32 value, and softmax.
#include <cmath>
#include <limits>

#include "broadcast.hpp"
#include "bytes.hpp"

namespace subbyte::runtime {
namespace {

// f of every value; the result may lie where x lies.
template <class F>
void map(Op& op, F f) {
  if (const Value bytes = op.bytes("x"); bytes.given() && op.result_scale()) {
    const ByteScale scale = *op.result_scale();
    return op.result(looked_up(op, bytes, scale, table_of(bytes.scale, scale, f)));
  }
  const Value x = op.floats("x");
  const Value y = op.make(Dtype::kFloat32, x.shape);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const float* in = run.in<float>(x);
        float* out = run.out<float>(y);
        spread(run.threads, x.count(), 1, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i) out[i] = f(in[i]);
        });
      },
      "float32", x);
  op.result(y);
}

float clamped(float x, float low, float high) {
  const float above = x < low ? low : x;
  return above > high ? high : above;
}

float sigmoid_of(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void relu(Op& op) {
  map(op, [](float x) { return x < 0.0f ? 0.0f : x; });
}

void clamp(Op& op, float low, float high) {
  map(op, [=](float x) { return clamped(x, low, high); });
}

void clip(Op& op) {
  const float low = static_cast<float>(op.real("min", -1.0));
  clamp(op, low, static_cast<float>(op.real("max", 1.0)));
}

void clamp_operator(Op& op) {
  constexpr double kMost = std::numeric_limits<double>::infinity();
  const float low = static_cast<float>(op.real("min", -kMost));
  clamp(op, low, static_cast<float>(op.real("max", kMost)));
}

void gelu(Op& op) {
  const std::string kind = op.word("approximate", "none");
  if (kind == "none")
    return map(op, [](float x) {
      return x * 0.5f * (1.0f + std::erf(x * static_cast<float>(M_SQRT1_2)));
    });
  if (kind != "tanh") op.fail("approximate is '" + shown(kind) + "'");
  map(op, [](float x) {
    const float beta = static_cast<float>(M_SQRT2 * M_2_SQRTPI * 0.5);
    return 0.5f * x * (1.0f + std::tanh(beta * (x + 0.044715f * x * x * x)));
  });
}

void sigmoid(Op& op) { map(op, sigmoid_of); }
void tanh_(Op& op) {
  map(op, [](float x) { return std::tanh(x); });
}
void silu(Op& op) {
  map(op, [](float x) { return x / (1.0f + std::exp(-x)); });
}

void mish(Op& op) {
  map(op, [](float x) { return x * std::tanh(std::log1p(std::exp(x))); });
}

void elu(Op& op) {
  const float alpha = static_cast<float>(op.real("alpha", 1.0));
  const float scale = static_cast<float>(op.real("scale", 1.0));
  const float inner = static_cast<float>(op.real("input_scale", 1.0));
  map(op, [=](float x) { return x <= 0.0f ? std::expm1(x * inner) * alpha * scale : x * scale; });
}

void leaky_relu(Op& op) {
  const float slope = static_cast<float>(op.real("alpha", 0.01));
  map(op, [=](float x) { return x > 0.0f ? x : x * slope; });
}

void hard_sigmoid(Op& op) {
  map(op, [](float x) { return clamped(x + 3.0f, 0.0f, 6.0f) / 6.0f; });
}

void hard_swish(Op& op) {
  map(op, [](float x) { return x * clamped(x + 3.0f, 0.0f, 6.0f) / 6.0f; });
}

void softplus(Op& op) {
  const float beta = static_cast<float>(op.real("beta", 1.0));
  const float threshold = static_cast<float>(op.real("threshold", 20.0));
  map(op,
      [=](float x) { return x * beta > threshold ? x : std::log1p(std::exp(x * beta)) / beta; });
}

void prelu(Op& op) {
  const Value x = op.floats("x"), slope = op.floats("slope");
  const std::int64_t n = slope.count(), channels = x.rank() > 1 ? x.shape[1] : 1;
  if (n != 1 && n != channels)
    op.fail("x is " + text_of(x.shape) + ", slopes " + text_of(slope.shape));
  const std::int64_t rows = x.rank() ? x.shape[0] * channels : 1;
  const std::int64_t plane = rows ? std::max<std::int64_t>(1, x.count() / rows) : 1;
  const Value y = op.make(Dtype::kFloat32, x.shape);
  op.step(
      {x, slope}, {y},
      [=](const Run& run) {
        for (std::int64_t i = 0, count = x.count(); i < count; ++i) {
          const float value = run.in<float>(x)[i];
          const float factor = run.in<float>(slope)[n == 1 ? 0 : i / plane % channels];
          run.out<float>(y)[i] = value > 0.0f ? value : value * factor;
        }
      },
      "float32", x);
  op.result(y);
}

void power(Op& op) {
  const double exponent = op.real("exponent");
  if (exponent == 2.0) return map(op, [](float x) { return x * x; });
  if (exponent == 3.0) return map(op, [](float x) { return x * x * x; });
  if (exponent == 0.5) return map(op, [](float x) { return std::sqrt(x); });
  if (exponent == -0.5) return map(op, [](float x) { return 1.0f / std::sqrt(x); });
  const float p = static_cast<float>(exponent);
  map(op, [=](float x) { return std::pow(x, p); });
}

void power_of_tensors(Op& op) {
  const Value x = op.floats("x"), exponent = op.floats("exponent");
  const Value y = op.make(Dtype::kFloat32, broadcast_shape(op, x.shape, exponent.shape));
  op.step({x, exponent}, {y}, [=](const Run& run) {
    map_pairs<float, float>(x, exponent, y, run, [](float a, float b) { return std::pow(a, b); });
  });
  op.result(y);
}

// f of every whole number, by its bits.
template <class F>
void map_whole(Op& op, const Value& x, F f) {
  if (x.dtype != Dtype::kInt64 && x.dtype != Dtype::kInt32) op.fail("a sign of such values");
  const Value y = op.make(x.dtype, x.shape);
  op.step({x}, {y}, [=](const Run& run) {
    with_type(x.dtype, [&](auto unit) {
      using T = decltype(unit);
      for (std::int64_t i = 0, n = x.count(); i < n; ++i)
        run.out<T>(y)[i] = static_cast<T>(f(static_cast<std::int64_t>(run.in<T>(x)[i])));
    });
  });
  op.result(y);
}

std::uint64_t negated(std::int64_t x) { return -static_cast<std::uint64_t>(x); }

void neg(Op& op) {
  const Value x = op.in("x");
  if (x.dtype != Dtype::kFloat32) return map_whole(op, x, negated);
  map(op, [](float value) { return -value; });
}

void abs_(Op& op) {
  const Value x = op.in("x");
  if (x.dtype != Dtype::kFloat32)
    return map_whole(op, x, [](std::int64_t value) {
      return value < 0 ? negated(value) : static_cast<std::uint64_t>(value);
    });
  map(op, [](float value) { return std::abs(value); });
}
void exp_(Op& op) {
  map(op, [](float x) { return std::exp(x); });
}
void log_(Op& op) {
  map(op, [](float x) { return std::log(x); });
}
void sqrt_(Op& op) {
  map(op, [](float x) { return std::sqrt(x); });
}
void rsqrt(Op& op) {
  map(op, [](float x) { return 1.0f / std::sqrt(x); });
}
void reciprocal(Op& op) {
  map(op, [](float x) { return 1.0f / x; });
}
void sin_(Op& op) {
  map(op, [](float x) { return std::sin(x); });
}
void cos_(Op& op) {
  map(op, [](float x) { return std::cos(x); });
}
void erf_(Op& op) {
  map(op, [](float x) { return std::erf(x); });
}

void softmax_operator(Op& op, bool log) {
  Value x = op.in("x");
  x = cast(op, x, op.dtype("dtype", x.dtype));
  if (x.dtype != Dtype::kFloat32) op.fail(std::string("x is ") + name_of(x.dtype));
  const int axis = op.axis("axis", x.rank());
  const std::int64_t n = x.rank() ? x.shape[axis] : 1;
  std::int64_t inner = 1;
  for (int d = axis + 1; d < x.rank(); ++d) inner *= x.shape[d];
  const std::int64_t rows = n ? x.count() / n : 0;
  const Value y = op.make(Dtype::kFloat32, x.shape);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const float* in = run.in<float>(x);
        float* out = run.out<float>(y);
        spread(run.threads, rows, 8 * n, [&](std::int64_t begin, std::int64_t end) {
          std::vector<float> row(n), given(n);
          for (std::int64_t r = begin; r < end; ++r) {
            const std::int64_t at = r / inner * n * inner + r % inner;
            for (std::int64_t i = 0; i < n; ++i) given[i] = in[at + i * inner];
            softmax(given.data(), n, row.data());
            if (log) {
              const float most = *std::max_element(given.begin(), given.end());
              double sum = 0.0;
              for (const float value : given) sum += std::exp(static_cast<double>(value) - most);
              const double total = std::log(sum);
              for (std::int64_t i = 0; i < n; ++i)
                row[i] = static_cast<float>(static_cast<double>(given[i]) - most - total);
            }
            for (std::int64_t i = 0; i < n; ++i) out[at + i * inner] = row[i];
          }
        });
      },
      "float32", x);
  op.result(y);
}

void softmax_plain(Op& op) { softmax_operator(op, false); }
void softmax_log(Op& op) { softmax_operator(op, true); }

}  // namespace

Operators activation_operators() {
  return {{"Relu", relu},
          {"Clip", clip},
          {"Clamp", clamp_operator},
          {"ClampMin", clamp_operator},
          {"Gelu", gelu},
          {"Sigmoid", sigmoid},
          {"Tanh", tanh_},
          {"Silu", silu},
          {"Mish", mish},
          {"Elu", elu},
          {"LeakyRelu", leaky_relu},
          {"HardSigmoid", hard_sigmoid},
          {"HardSwish", hard_swish},
          {"Softplus", softplus},
          {"PRelu", prelu},
          {"Pow", power},
          {"PowTensor", power_of_tensors},
          {"Neg", neg},
          {"Abs", abs_},
          {"Exp", exp_},
          {"Log", log_},
          {"Sqrt", sqrt_},
          {"ReciprocalSqrt", rsqrt},
          {"Reciprocal", reciprocal},
          {"Sin", sin_},
          {"Cos", cos_},
          {"Erf", erf_},
          {"Softmax", softmax_plain},
          {"LogSoftmax", softmax_log}};
}

}  // namespace subbyte::runtime
