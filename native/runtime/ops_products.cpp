// Products of float tensors, and attention.
#include <cmath>
#include <limits>
#include <memory>

#include "math.hpp"
#include "norms.hpp"

namespace subbyte::runtime {
namespace {

using Kind = Json::Kind;

void linear_operator(Op& op) {
  const Value x = op.floats("x"), weight = op.floats("weight"), bias = op.maybe_floats("bias");
  if (weight.rank() != 2 || !x.rank() || x.shape.back() != weight.shape[1])
    op.fail("x is " + text_of(x.shape) + ", the weight " + text_of(weight.shape));
  const std::int64_t n = weight.shape[0], k = weight.shape[1], m = k ? x.count() / k : 0;
  if (bias.given() && bias.shape != Shape{n}) op.fail("the bias is " + text_of(bias.shape));
  Shape shape = x.shape;
  shape.back() = n;
  const Value y = op.make(Dtype::kFloat32, shape);
  op.step(
      {x, weight, bias}, {y},
      [=](const Run& run) {
        multiply_rows(run.in<float>(x), run.in<float>(weight),
                      bias.given() ? run.in<float>(bias) : nullptr, m, n, k, run.out<float>(y),
                      run.threads);
      },
      "float32");
  op.result(y);
}

// Batches of matrices, which broadcast.
Value product(Op& op, Value a, Value b) {
  if (!a.rank() || !b.rank()) op.fail("a product of a number");
  const bool row = a.rank() == 1, column = b.rank() == 1;
  if (row) a = op.view(a, {1, a.shape[0]});
  if (column) b = op.view(b, {b.shape[0], 1});
  const std::int64_t m = a.shape[a.rank() - 2], k = a.shape.back(), n = b.shape.back();
  if (b.shape[b.rank() - 2] != k)
    op.fail("a is " + text_of(a.shape) + ", b is " + text_of(b.shape));
  const int rank = std::max(a.rank(), b.rank()) - 2;
  Shape batch(rank, 1), of_a(rank, 0), of_b(rank, 0);
  std::int64_t step_a = 1, step_b = 1;
  for (int d = rank; d-- > 0;) {
    const int ia = d - (rank - a.rank() + 2), ib = d - (rank - b.rank() + 2);
    const std::int64_t sa = ia >= 0 ? a.shape[ia] : 1, sb = ib >= 0 ? b.shape[ib] : 1;
    if (sa != sb && sa != 1 && sb != 1)
      op.fail("a is " + text_of(a.shape) + ", b is " + text_of(b.shape));
    batch[d] = sa == 1 ? sb : sa;
    of_a[d] = sa == 1 ? 0 : step_a, of_b[d] = sb == 1 ? 0 : step_b;
    step_a *= sa, step_b *= sb;
  }
  Shape shape = batch;
  shape.push_back(m), shape.push_back(n);
  const Value y = op.make(Dtype::kFloat32, shape);
  const std::int64_t count = count_of(batch);
  op.step(
      {a, b}, {y},
      [=](const Run& run) {
        for (std::int64_t i = 0; i < count; ++i) {
          std::int64_t rest = i, at_a = 0, at_b = 0;
          for (int d = rank; d-- > 0; rest /= batch[d]) {
            at_a += rest % batch[d] * of_a[d];
            at_b += rest % batch[d] * of_b[d];
          }
          multiply_plain(run.in<float>(a) + at_a * m * k, run.in<float>(b) + at_b * k * n, m, n, k,
                         run.out<float>(y) + i * m * n, run.threads);
        }
      },
      "float32");
  if (!row && !column) return y;
  shape = batch;
  if (!row) shape.push_back(m);
  if (!column) shape.push_back(n);
  return op.view(y, shape);
}

void matmul(Op& op) {
  const Value a = op.floats("a"), b = op.floats("b");
  op.result(product(op, a, b));
}

void add_matmul(Op& op) {
  const Value c = op.floats("c"), a = op.floats("a"), b = op.floats("b");
  const float alpha = static_cast<float>(op.real("alpha", 1.0));
  const float beta = static_cast<float>(op.real("beta", 1.0));
  if (a.rank() != 2 || b.rank() != 2) op.fail("a is " + text_of(a.shape));
  const Value p = product(op, a, b);
  const std::int64_t m = p.shape[0], n = p.shape[1];
  const std::int64_t rows = c.rank() == 2 ? c.shape[0] : 1, width = c.rank() ? c.shape.back() : 1;
  if (c.rank() > 2 || (rows != 1 && rows != m) || (width != 1 && width != n))
    op.fail("c is " + text_of(c.shape) + ", the product " + text_of(p.shape));
  const Value y = op.make(Dtype::kFloat32, p.shape);
  op.step(
      {c, p}, {y},
      [=](const Run& run) {
        const float *in = run.in<float>(c), *x = run.in<float>(p);
        float* out = run.out<float>(y);
        for (std::int64_t i = 0; i < m * n; ++i) {
          const float other = in[(rows == 1 ? 0 : i / n) * width + (width == 1 ? 0 : i % n)];
          out[i] = alpha * x[i] + (beta == 0.0f ? 0.0f : beta * other);
        }
      },
      "float32");
  op.result(y);
}

// ---------------------------------------------------------------- attention

struct Part {  // where the row (batch, head, i) of a tensor lies
  const float* at;
  std::int64_t batch, head, row;
  const float* of(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return at + b * batch + h * head + i * row;
  }
};

struct Sizes {
  std::int64_t batch, heads, rows, keys, width, values;
  float scale;
  bool safe;  // a row that is masked as a whole becomes 0, not NaN
};

// mask(b, h, i, j): what is added to a score. weights: [batch][heads][rows][keys], or null.
template <class Mask>
void attend(const Sizes& s, const Part& q, const Part& k, const Part& v, Mask&& mask,
            const Part& out, float* weights, int threads) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  spread(threads, s.batch * s.heads * s.rows, s.keys * (s.width + s.values),
         [&](std::int64_t begin, std::int64_t end) {
           std::vector<float> score(s.keys);
           for (std::int64_t at = begin; at < end; ++at) {
             const std::int64_t i = at % s.rows, h = at / s.rows % s.heads,
                                b = at / s.rows / s.heads;
             bool any = false;
             for (std::int64_t j = 0; j < s.keys; ++j) {
               score[j] = dot(q.of(b, h, i), k.of(b, h, j), s.width) * s.scale + mask(b, h, i, j);
               any = any || score[j] != kNone;
             }
             if (any || !s.safe)
               softmax(score.data(), s.keys, score.data());
             else
               std::fill(score.begin(), score.end(), 0.0f);
             if (weights) std::copy(score.begin(), score.end(), weights + at * s.keys);
             float* row = const_cast<float*>(out.of(b, h, i));
             std::fill_n(row, s.values, 0.0f);
             for (std::int64_t j = 0; j < s.keys; ++j) {
               const float* value = v.of(b, h, j);
               for (std::int64_t c = 0; c < s.values; ++c) row[c] += score[j] * value[c];
             }
           }
         });
}

// How a mask lies that broadcasts to [batch, heads, rows, keys].
struct Masked {
  Value value;
  std::int64_t batch = 0, head = 0, row = 0, key = 0;
};

Masked broadcast_mask(Op& op, const Value& mask, const Shape& wanted) {
  Masked found{mask};
  if (!mask.given()) return found;
  if (mask.dtype != Dtype::kFloat32 && mask.dtype != Dtype::kBool)
    op.fail(std::string("a mask is ") + name_of(mask.dtype));
  std::int64_t* steps[4] = {&found.batch, &found.head, &found.row, &found.key};
  std::int64_t step = 1;
  for (int d = 4, i = mask.rank(); i-- > 0;) {
    if (--d < 0 || (mask.shape[i] != 1 && mask.shape[i] != wanted[d]))
      op.fail("a mask is " + text_of(mask.shape) + ", the scores " + text_of(wanted));
    if (mask.shape[i] != 1) *steps[d] = step;
    step *= mask.shape[i];
  }
  return found;
}

// What a mask adds at a place. ignored: what a bool says of it.
float masked(const Run& run, const Masked& mask, std::int64_t place, bool ignored) {
  if (!mask.value.given()) return 0.0f;
  if (mask.value.dtype == Dtype::kFloat32) return run.in<float>(mask.value)[place];
  const bool set = run.in<std::uint8_t>(mask.value)[place] != 0;
  return set == ignored ? -std::numeric_limits<float>::infinity() : 0.0f;
}

Shape as_four(const Shape& shape) {
  Shape found = shape;
  while (found.size() < 4) found.insert(found.begin(), 1);
  while (found.size() > 4) {
    found[0] *= found[1];
    found.erase(found.begin() + 1);
  }
  return found;
}

void attention(Op& op) {
  const Value q = op.floats("Q"), k = op.floats("K"), v = op.floats("V"), mask = op.maybe("mask");
  if (op.real("dropout_p", 0.0) != 0.0) op.fail("dropout is on");
  const bool causal = op.flag("is_causal", false), shared = op.flag("enable_gqa", false);
  if (q.rank() < 2 || k.rank() != q.rank() || v.rank() != q.rank())
    op.fail("Q is " + text_of(q.shape) + ", K is " + text_of(k.shape));
  if (mask.given() && q.rank() > 4) op.fail("a mask for " + text_of(q.shape));
  const Shape a = as_four(q.shape), b = as_four(k.shape), c = as_four(v.shape);
  const std::int64_t groups = shared && b[1] ? a[1] / b[1] : 1;
  const bool fits = a[0] == b[0] && b[0] == c[0] && b[1] == c[1] && a[1] == b[1] * groups &&
                    a[3] == b[3] && b[2] == c[2];
  if (!fits) op.fail("Q is " + text_of(q.shape) + ", K is " + text_of(k.shape));
  const double scale = op.real("scale", 1.0 / std::sqrt(static_cast<double>(a[3])));
  const Sizes s{a[0], a[1], a[2], b[2], a[3], c[3], static_cast<float>(scale), true};
  const Masked own = broadcast_mask(op, mask, {a[0], a[1], a[2], b[2]});
  Shape shape = q.shape;
  shape.back() = c[3];
  const Value y = op.make(Dtype::kFloat32, shape);
  op.step(
      {q, k, v, mask}, {y},
      [=](const Run& run) {
        // Several heads of queries share one of keys: heads of queries count as rows of `groups`.
        const auto of = [&](const Value& x, const Shape& t) {
          return Part{run.in<float>(x), t[1] * t[2] * t[3], t[2] * t[3], t[3]};
        };
        const Part keys = of(k, b), values = of(v, c);
        for (std::int64_t g = 0; g < groups; ++g) {
          Sizes sizes = s;
          sizes.heads = b[1];
          Part rows = of(q, a), out = of(y, {a[0], a[1], a[2], c[3]});
          rows.at += g * rows.head, out.at += g * out.head;
          rows.head *= groups, out.head *= groups;
          attend(
              sizes, rows, keys, values,
              [&](std::int64_t n, std::int64_t h, std::int64_t i, std::int64_t j) {
                if (causal && j > i) return -std::numeric_limits<float>::infinity();
                return masked(
                    run, own,
                    n * own.batch + (h * groups + g) * own.head + i * own.row + j * own.key, false);
              },
              out, nullptr, run.threads);
        }
      },
      "float32");
  op.result(y);
}

// ---------------------------------------------------------------- nn.MultiheadAttention

struct Layer {
  std::string name;
  std::int64_t width, heads;
  bool first, weights, average;

  std::string part(const char* own) const { return name.empty() ? own : name + "." + own; }
};

// Self-attention of x, by the kernels.
void self_attention(Op& op, const Layer& layer, const Value& x, const Packed& in) {
  const std::int64_t width = layer.width, size = width / layer.heads;
  const std::int64_t batch = x.shape[layer.first ? 0 : 1], rows = x.shape[layer.first ? 1 : 0];
  const Value all = packed_linear(op, x, in, op.maybe_state(layer.part("in_proj_bias")));
  const Value mixed = op.make(Dtype::kFloat32, x.shape);
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  const Sizes s{batch, layer.heads, rows, rows, size, size, scale, true};
  op.step(
      {all}, {mixed},
      [=](const Run& run) {
        const auto of = [&](const float* at, std::int64_t step) {
          return Part{at, layer.first ? rows * step : step, size,
                      layer.first ? step : batch * step};
        };
        const float* at = run.in<float>(all);
        attend(
            s, of(at, 3 * width), of(at + width, 3 * width), of(at + 2 * width, 3 * width),
            [](std::int64_t, std::int64_t, std::int64_t, std::int64_t) { return 0.0f; },
            of(run.out<float>(mixed), width), nullptr, run.threads);
      },
      "float32");
  const std::string name = layer.part("out_proj");
  const Packed* out = op.packed(name);
  if (out) return op.result({packed_layer(op, mixed, name, *out), op.make(Dtype::kFloat32, {0})});
  const Value weight = op.state(name + ".weight"), bias = op.maybe_state(name + ".bias");
  if (weight.dtype != Dtype::kFloat32 || weight.shape != Shape{width, width})
    op.fail("out_proj.weight is " + text_of(weight.shape));
  if (bias.given() && (bias.dtype != Dtype::kFloat32 || bias.shape != Shape{width}))
    op.fail("out_proj.bias is " + text_of(bias.shape));
  const Value y = op.make(Dtype::kFloat32, x.shape);
  op.step(
      {mixed, weight, bias}, {y},
      [=](const Run& run) {
        multiply_rows(run.in<float>(mixed), run.in<float>(weight),
                      bias.given() ? run.in<float>(bias) : nullptr, batch * rows, width, width,
                      run.out<float>(y), run.threads);
      },
      "float32");
  op.result({y, op.make(Dtype::kFloat32, {0})});
}

using Floats = std::shared_ptr<std::vector<float>>;

// A projection's weight [rows][width] in float32, packed or not.
Floats weight_of(Op& op, const std::string& packed, const std::string& stored, const Shape& shape,
                 const Tensor* tensor) {
  if (const Packed* found = op.packed(packed)) {
    if (found->shape() != shape) op.fail("'" + packed + "' is " + text_of(found->shape()));
    return std::make_shared<std::vector<float>>(found->decoded(true));
  }
  if (!tensor || tensor->dtype != Dtype::kFloat32 || tensor->shape != shape)
    op.fail("the file has no '" + stored + "' " + text_of(shape));
  const float* at = reinterpret_cast<const float*>(tensor->data);
  return std::make_shared<std::vector<float>>(at, at + count_of(shape));
}

// As torch.nn.functional.multi_head_attention_forward, with decoded weights.
void general_attention(Op& op, const Layer& layer, const std::array<Value, 3>& x) {
  const std::int64_t width = layer.width, size = width / layer.heads;
  const Value padding = op.maybe("key_padding_mask"), mask = op.maybe("attn_mask");
  const int first = layer.first ? 0 : 1;
  const std::int64_t batch = x[0].shape[first], rows = x[0].shape[1 - first];
  const std::int64_t keys = x[1].shape[1 - first];
  if (x[1].shape[first] != batch || x[2].shape[first] != batch || x[2].shape[1 - first] != keys)
    op.fail("keys are " + text_of(x[1].shape) + ", queries " + text_of(x[0].shape));
  const Floats joint = op.packed(layer.part("in_proj")) || op.stored(layer.part("in_proj.weight"))
                           ? weight_of(op, layer.part("in_proj"), layer.part("in_proj.weight"),
                                       {3 * width, width}, op.stored(layer.part("in_proj.weight")))
                           : nullptr;
  std::array<Floats, 3> own;
  const char* const names[3] = {"q_proj", "k_proj", "v_proj"};
  for (int i = 0; i < 3; ++i) {
    const std::string name = layer.part(names[i]);
    if (joint && x[i].shape.back() != width) op.fail("x is " + text_of(x[i].shape));
    own[i] = joint ? std::make_shared<std::vector<float>>(joint->begin() + i * width * width,
                                                          joint->begin() + (i + 1) * width * width)
                   : weight_of(op, name, name + ".weight", {width, x[i].shape.back()},
                               op.stored(name + ".weight"));
  }
  const std::string out_name = layer.part("out_proj");
  const Floats out = weight_of(op, out_name, out_name + ".weight", {width, width},
                               op.stored(out_name + ".weight"));
  const Value bias = op.maybe_state(layer.part("in_proj_bias"));
  if (bias.given() && (bias.dtype != Dtype::kFloat32 || bias.shape != Shape{3 * width}))
    op.fail("in_proj_bias is " + text_of(bias.shape));
  Value last = op.maybe_state(out_name + ".bias");
  const Packed* packed = op.packed(out_name);
  if (!last.given() && packed && !packed->bias().empty())
    last = op.constant_floats(packed->bias(), {static_cast<std::int64_t>(packed->bias().size())});
  if (last.given() && (last.dtype != Dtype::kFloat32 || last.shape != Shape{width}))
    op.fail("out_proj.bias is " + text_of(last.shape));
  Value by_heads = mask;
  if (mask.given() && mask.rank() == 3) {
    if (mask.shape[0] != batch * layer.heads) op.fail("attn_mask is " + text_of(mask.shape));
    by_heads = op.view(mask, {batch, layer.heads, mask.shape[1], mask.shape[2]});
  }
  const Masked scores = broadcast_mask(op, by_heads, {batch, layer.heads, rows, keys});
  Value over = padding;
  if (padding.given()) {
    if (padding.shape != Shape{batch, keys})
      op.fail("key_padding_mask is " + text_of(padding.shape));
    over = op.view(padding, {batch, 1, 1, keys});
  }
  const Masked hidden = broadcast_mask(op, over, {batch, layer.heads, rows, keys});
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  const Sizes s{batch, layer.heads, rows, keys, size, size, scale, !layer.weights};

  std::array<Value, 3> part;
  for (int i = 0; i < 3; ++i) {
    Shape shape = x[i].shape;
    shape.back() = width;
    part[i] = op.make(Dtype::kFloat32, shape);
    const std::int64_t k = x[i].shape.back(), n = k ? x[i].count() / k : 0;
    op.step(
        {x[i], bias}, {part[i]},
        [=, from = x[i], to = part[i], weight = own[i]](const Run& run) {
          const float* shift = bias.given() ? run.in<float>(bias) + i * width : nullptr;
          multiply_rows(run.in<float>(from), weight->data(), shift, n, width, k, run.out<float>(to),
                        run.threads);
        },
        "float32, decoded");
  }
  const Value mixed = op.make(Dtype::kFloat32, part[0].shape);
  const Value y = op.make(Dtype::kFloat32, part[0].shape);
  const Value heads =
      op.make(Dtype::kFloat32, layer.weights ? Shape{batch, layer.heads, rows, keys} : Shape{0});
  op.step(
      {part[0], part[1], part[2], by_heads, over}, {mixed, heads},
      [=](const Run& run) {
        const auto of = [&](const Value& value) {
          const std::int64_t n = value.shape[1 - first];
          return Part{run.in<float>(value), first ? width : n * width, size,
                      first ? batch * width : width};
        };
        attend(
            s, of(part[0]), of(part[1]), of(part[2]),
            [&](std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) {
              return masked(run, scores,
                            b * scores.batch + h * scores.head + i * scores.row + j * scores.key,
                            true) +
                     masked(run, hidden, b * hidden.batch + j * hidden.key, true);
            },
            of(mixed), layer.weights ? run.out<float>(heads) : nullptr, run.threads);
      },
      "float32");
  op.step(
      {mixed, last}, {y},
      [=](const Run& run) {
        multiply_rows(run.in<float>(mixed), out->data(),
                      last.given() ? run.in<float>(last) : nullptr, batch * rows, width, width,
                      run.out<float>(y), run.threads);
      },
      "float32, decoded");
  if (!layer.weights || !layer.average) return op.result({y, heads});
  const Value mean = op.make(Dtype::kFloat32, {batch, rows, keys});
  op.step(
      {heads}, {mean},
      [=](const Run& run) {
        const std::int64_t n = rows * keys;
        for (std::int64_t b = 0; b < batch; ++b)
          for (std::int64_t i = 0; i < n; ++i) {
            float sum = 0.0f;
            for (std::int64_t h = 0; h < layer.heads; ++h)
              sum += run.in<float>(heads)[(b * layer.heads + h) * n + i];
            run.out<float>(mean)[b * n + i] = sum / static_cast<float>(layer.heads);
          }
      },
      "float32");
  op.result({y, mean});
}

}  // namespace

void attention_layer(Op& op) {
  const Json& settings = op.settings();
  const std::array<Value, 3> x{op.floats("query"), op.floats("key"), op.floats("value")};
  Layer layer{op.layer(),
              settings.at("embed_dim", Kind::kInteger).integer,
              settings.at("num_heads", Kind::kInteger).integer,
              settings.at("batch_first", Kind::kBool).integer != 0,
              op.flag("need_weights", true),
              op.flag("average_attn_weights", true)};
  const bool hint = op.flag("is_causal", false);
  const bool good = layer.width >= 1 && layer.heads >= 1 && layer.width % layer.heads == 0 &&
                    layer.width < std::int64_t{1} << 20;
  if (!good) op.fail("attention of " + std::to_string(layer.width) + " values");
  if (settings.at("add_bias_kv", Kind::kBool).integer ||
      settings.at("add_zero_attn", Kind::kBool).integer)
    op.fail("attention with add_bias_kv or add_zero_attn does not run");
  for (const Value& value : x)
    if (value.rank() != 3) op.fail("x is " + text_of(value.shape) + ", not of 3 dimensions");
  if (x[0].shape.back() != layer.width) op.fail("queries are " + text_of(x[0].shape));
  const Packed* in = op.packed(layer.part("in_proj"));
  const bool same = x[0].id == x[1].id && x[1].id == x[2].id;
  if (same && in && in->shape() == Shape{3 * layer.width, layer.width} && !layer.weights &&
      !op.has("key_padding_mask") && !op.has("attn_mask") && !hint && in->served(layer.width)) {
    op.ignore({"key_padding_mask", "attn_mask"});
    const Value bias = op.maybe_state(layer.part("in_proj_bias"));
    if (bias.given() && (bias.dtype != Dtype::kFloat32 || bias.shape != Shape{3 * layer.width}))
      op.fail("in_proj_bias is " + text_of(bias.shape));
    return self_attention(op, layer, x[0], *in);
  }
  if (hint && !op.has("attn_mask")) op.fail("is_causal without attn_mask");
  general_attention(op, layer, x);
}

Operators product_operators() {
  return {{"Linear", linear_operator}, {"MatMul", matmul},        {"BatchMatMul", matmul},
          {"MatMul2d", matmul},        {"AddMatMul", add_matmul}, {"Attention", attention}};
}

}  // namespace subbyte::runtime
