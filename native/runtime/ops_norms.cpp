// Norms in float32, with sums in float64.
#include <cmath>

#include "math.hpp"
#include "norms.hpp"

namespace subbyte::runtime {
namespace {

void check_parts(Op& op, const std::vector<Value>& parts, std::int64_t count) {
  for (const Value& part : parts)
    if (part.given() && (part.dtype != Dtype::kFloat32 || part.count() != count))
      op.fail("a norm of " + std::to_string(count) + " values has a tensor " + text_of(part.shape));
}

// a * b + c, rounded once (but for one case in 2^29), as PyTorch's vectors do.
inline float fused(float a, double b, double c) { return static_cast<float>(a * b + c); }

const float* maybe(const Run& run, const Value& value) {
  return value.given() ? run.in<float>(value) : nullptr;
}

}  // namespace

Value affine(Op& op, const Value& x, const Value& scale, const Value& shift,
             std::int64_t channels) {
  check_parts(op, {scale, shift}, channels);
  const Value y = op.make(Dtype::kFloat32, x.shape);
  const std::int64_t planes = x.shape[0] * channels, n = planes ? x.count() / planes : 0;
  op.step(
      {x, scale, shift}, {y},
      [=](const Run& run) {
        const float *in = run.in<float>(x), *a = run.in<float>(scale), *b = run.in<float>(shift);
        float* out = run.out<float>(y);
        spread(run.threads, planes, n, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i) {
            const double factor = a[i % channels], offset = b[i % channels];
            for (std::int64_t k = i * n; k < (i + 1) * n; ++k)
              out[k] = fused(in[k], factor, offset);
          }
        });
      },
      "float32", x);
  return y;
}

Value batch_norm(Op& op, const Value& x, const std::array<Value, 4>& parts, double eps) {
  if (x.rank() < 2) op.fail("x is " + text_of(x.shape));
  const std::int64_t channels = x.shape[1];
  check_parts(op, {parts.begin(), parts.end()}, channels);
  if (!(eps >= 0)) op.fail("eps is " + std::to_string(eps));
  const Value scale = op.make(Dtype::kFloat32, {channels});
  const Value shift = op.make(Dtype::kFloat32, {channels});
  op.step({parts[0], parts[1], parts[2], parts[3]}, {scale, shift}, [=](const Run& run) {
    const float *weight = maybe(run, parts[0]), *bias = maybe(run, parts[1]);
    const float *mean = run.in<float>(parts[2]), *variance = run.in<float>(parts[3]);
    float *a = run.out<float>(scale), *b = run.out<float>(shift);
    for (std::int64_t c = 0; c < channels; ++c) {
      const float inverse = 1.0f / std::sqrt(variance[c] + static_cast<float>(eps));
      a[c] = inverse * (weight ? weight[c] : 1.0f);
      b[c] = fused(-mean[c], a[c], bias ? bias[c] : 0.0f);
    }
  });
  return affine(op, x, scale, shift, channels);
}

namespace {

void batch_normalization(Op& op) {
  const Value x = op.floats("x");
  const Value y = batch_norm(
      op, x,
      {op.maybe_floats("scale"), op.maybe_floats("bias"), op.floats("mean"), op.floats("var")},
      op.real("epsilon"));
  op.ignore({"momentum"});
  op.result(std::vector<Value>{y});
}

// Rows of n values to mean 0 and variance 1 (or, if `root`, to a root mean square of 1); then times
// weight[i], plus bias[i], where i is the value's place in the row, or its channel.
struct RowNorm {
  std::int64_t rows, n;
  double eps;
  bool root;
  std::int64_t channels, plane;  // 0: weights by place
};

void normalize(const RowNorm& norm, const float* x, const float* weight, const float* bias,
               float* y, int threads) {
  spread(threads, norm.rows, norm.n, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const float* in = x + row * norm.n;
      float* out = y + row * norm.n;
      double sum = 0.0, square = 0.0;
      for (std::int64_t i = 0; i < norm.n && !norm.root; ++i) sum += in[i];
      const double mean = sum / static_cast<double>(norm.n);
      for (std::int64_t i = 0; i < norm.n; ++i) square += (in[i] - mean) * (in[i] - mean);
      const double factor = 1.0 / std::sqrt(square / static_cast<double>(norm.n) + norm.eps);
      for (std::int64_t i = 0; i < norm.n; ++i) {
        const std::int64_t place = norm.plane ? (row * norm.n + i) / norm.plane % norm.channels : i;
        const double value = (in[i] - mean) * factor;
        out[i] =
            static_cast<float>(value * (weight ? weight[place] : 1.0) + (bias ? bias[place] : 0.0));
      }
    }
  });
}

void norm_of_rows(Op& op, RowNorm norm, const Value& x, const Value& weight, const Value& bias) {
  check_parts(op, {weight, bias}, norm.plane ? norm.channels : norm.n);
  if (norm.n < 1) op.fail("x is " + text_of(x.shape));
  const Value y = op.make(Dtype::kFloat32, x.shape);
  op.step(
      {x, weight, bias}, {y},
      [=](const Run& run) {
        normalize(norm, run.in<float>(x), maybe(run, weight), maybe(run, bias), run.out<float>(y),
                  run.threads);
      },
      "float32", x);
  op.result(y);
}

void norm_of_last(Op& op, bool root, double eps) {
  const Value x = op.floats("x"), weight = op.maybe_floats("weight");
  const Value bias = op.maybe_floats("bias");
  const Shape sizes = op.integers("normalized_shape");
  const std::int64_t n = count_of(sizes);
  if (sizes.size() > x.shape.size() || !std::equal(sizes.rbegin(), sizes.rend(), x.shape.rbegin()))
    op.fail("x is " + text_of(x.shape) + ", the norm is of " + text_of(sizes));
  op.ignore({"cudnn_enable"});
  norm_of_rows(op, {n ? x.count() / n : 0, n, eps, root, 0, 0}, x, weight, bias);
}

void layer_normalization(Op& op) { norm_of_last(op, false, op.real("epsilon", 1e-5)); }

void rms_normalization(Op& op) {
  norm_of_last(op, true, op.real("epsilon", 1.1920928955078125e-07));
}

void group_normalization(Op& op) {
  const Value x = op.floats("x"), weight = op.maybe_floats("weight");
  const Value bias = op.maybe_floats("bias");
  const std::int64_t groups = op.integer("num_groups");
  if (x.rank() < 2 || groups < 1 || x.shape[1] % groups || x.count() < 1)
    op.fail("x is " + text_of(x.shape) + ", groups are " + std::to_string(groups));
  op.ignore({"cudnn_enabled"});
  const std::int64_t rows = x.shape[0] * groups, n = x.count() / rows;
  const std::int64_t plane = x.count() / (x.shape[0] * x.shape[1]);
  norm_of_rows(op, {rows, n, op.real("epsilon", 1e-5), false, x.shape[1], plane}, x, weight, bias);
}

void instance_normalization(Op& op) {
  const Value x = op.floats("x"), weight = op.maybe_floats("weight");
  const Value bias = op.maybe_floats("bias");
  if (!op.flag("use_input_stats", true)) {
    op.ignore({"momentum", "cudnn_enabled"});
    return op.result(batch_norm(op, x,
                                {weight, bias, op.floats("running_mean"), op.floats("running_var")},
                                op.real("epsilon")));
  }
  op.ignore({"running_mean", "running_var", "momentum", "cudnn_enabled"});
  if (x.rank() < 2 || x.count() < 1) op.fail("x is " + text_of(x.shape));
  const std::int64_t rows = x.shape[0] * x.shape[1], plane = x.count() / rows;
  norm_of_rows(op, {rows, plane, op.real("epsilon"), false, x.shape[1], plane}, x, weight, bias);
}

}  // namespace

Operators norm_operators() {
  return {{"BatchNormalization", batch_normalization},
          {"LayerNormalization", layer_normalization},
          {"RMSNormalization", rms_normalization},
          {"GroupNormalization", group_normalization},
          {"InstanceNormalization", instance_normalization}};
}

}  // namespace subbyte::runtime
