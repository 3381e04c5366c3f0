// Images of another size.
#include <cmath>

#include "math.hpp"
#include "op.hpp"

namespace subbyte::runtime {
namespace {

struct Sizes {
  Shape shape;
  std::vector<double> factor;  // of each of the last dimensions; 0: it follows from the sizes
};

Sizes sizes_of(Op& op, const Value& x, int dims) {
  Sizes found{x.shape, std::vector<double>(dims, 0.0)};
  if (x.rank() != dims + 2) op.fail("x is " + text_of(x.shape));
  const Arg factors = op.arg("scale_factors");
  const Shape given = op.integers("output_size", {});
  for (int d = 0; d < dims; ++d) {
    std::int64_t& size = found.shape[2 + d];
    if (static_cast<int>(given.size()) == dims) {
      size = given[d];
    } else if (factors.kind == Arg::Kind::kList && static_cast<int>(factors.list.size()) == dims) {
      const Arg& own = factors.list[d];
      found.factor[d] =
          own.kind == Arg::Kind::kInteger ? static_cast<double>(own.integer) : own.real;
      const double wanted = static_cast<double>(size) * found.factor[d];
      if (!(wanted >= 0 && wanted < 2147483648.0)) op.fail("scale_factors are out of range");
      size = static_cast<std::int64_t>(wanted);
    } else {
      op.fail("neither output_size nor scale_factors fit");
    }
    if (size < 1 || x.shape[2 + d] < 1) op.fail("the result is " + text_of(found.shape));
  }
  return found;
}

template <int Dims>
void nearest(Op& op) {
  const Value x = op.floats("x");
  const Sizes sizes = sizes_of(op, x, Dims);
  const Value y = op.make(x.dtype, sizes.shape);
  std::array<std::vector<std::int64_t>, 3> from;
  std::array<std::int64_t, 3> in{1, 1, 1}, out{1, 1, 1};
  for (int d = 0; d < 3; ++d) from[d].assign(1, 0);
  for (int d = 0; d < Dims; ++d) {
    const int at = 3 - Dims + d;
    in[at] = x.shape[2 + d], out[at] = sizes.shape[2 + d];
    const float scale = sizes.factor[d] > 0
                            ? static_cast<float>(1.0 / sizes.factor[d])
                            : static_cast<float>(in[at]) / static_cast<float>(out[at]);
    from[at].clear();
    for (std::int64_t i = 0; i < out[at]; ++i)
      from[at].push_back(std::min(
          static_cast<std::int64_t>(std::floor(static_cast<float>(i) * scale)), in[at] - 1));
  }
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const std::int64_t planes = x.shape[0] * x.shape[1], n = out[0] * out[1] * out[2];
        spread(run.threads, planes, n, [&](std::int64_t begin, std::int64_t end) {
          float* to = run.out<float>(y) + begin * n;
          for (std::int64_t plane = begin; plane < end; ++plane)
            for (std::int64_t a = 0; a < out[0]; ++a)
              for (std::int64_t b = 0; b < out[1]; ++b) {
                const float* row =
                    run.in<float>(x) + ((plane * in[0] + from[0][a]) * in[1] + from[1][b]) * in[2];
                for (std::int64_t c = 0; c < out[2]; ++c) *to++ = row[from[2][c]];
              }
        });
      },
      "float32");
  op.result(y);
}

// Where place i of a result lies between two of x, and the share of the second.
struct Between {
  std::int64_t low, high;
  float share;
};

std::vector<Between> places(std::int64_t in, std::int64_t out, bool corners, double factor) {
  std::vector<Between> found;
  const float step =
      corners      ? (out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0.0f)
      : factor > 0 ? static_cast<float>(1.0 / factor)
                   : static_cast<float>(in) / static_cast<float>(out);
  for (std::int64_t i = 0; i < out; ++i) {
    const float at = corners ? step * static_cast<float>(i)
                             : std::max(0.0f, step * (static_cast<float>(i) + 0.5f) - 0.5f);
    const std::int64_t low = std::min(static_cast<std::int64_t>(at), in - 1);
    const float share = std::min(std::max(at - static_cast<float>(low), 0.0f), 1.0f);
    found.push_back({low, std::min(low + 1, in - 1), share});
  }
  return found;
}

void bilinear(Op& op) {
  const Value x = op.floats("x");
  const bool corners = op.flag("align_corners", false);
  const Sizes sizes = sizes_of(op, x, 2);
  const Value y = op.make(x.dtype, sizes.shape);
  const std::int64_t h = x.shape[2], w = x.shape[3];
  const auto rows = places(h, sizes.shape[2], corners, sizes.factor[0]);
  const auto columns = places(w, sizes.shape[3], corners, sizes.factor[1]);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const std::int64_t n = static_cast<std::int64_t>(rows.size() * columns.size());
        spread(
            run.threads, x.shape[0] * x.shape[1], 4 * n, [&](std::int64_t begin, std::int64_t end) {
              float* to = run.out<float>(y) + begin * n;
              for (std::int64_t plane = begin; plane < end; ++plane)
                for (const Between& row : rows) {
                  const float* image = run.in<float>(x) + plane * h * w;
                  const float *top = image + row.low * w, *bottom = image + row.high * w;
                  for (const Between& c : columns) {
                    const float above = (1.0f - c.share) * top[c.low] + c.share * top[c.high];
                    const float below = (1.0f - c.share) * bottom[c.low] + c.share * bottom[c.high];
                    *to++ = (1.0f - row.share) * above + row.share * below;
                  }
                }
            });
      },
      "float32");
  op.result(y);
}

void pixel_shuffle(Op& op) {
  const Value x = op.in("x");
  const std::int64_t r = op.integer("upscale_factor");
  if (x.rank() < 3 || r < 1 || r > 1 << 15) op.fail("x is " + text_of(x.shape));
  const std::int64_t c = x.shape[x.rank() - 3], h = x.shape[x.rank() - 2], w = x.shape.back();
  if (c % (r * r)) op.fail("x is " + text_of(x.shape) + ", the factor " + std::to_string(r));
  Shape shape(x.shape.begin(), x.shape.end() - 3);
  const std::int64_t n = count_of(shape);
  shape.push_back(c / (r * r)), shape.push_back(h * r), shape.push_back(w * r);
  const Value y = op.make(x.dtype, shape);
  op.step({x}, {y}, [=](const Run& run) {  // [n, c, r, r, h, w] -> [n, c, h, r, w, r]
    const std::int64_t plane = h * w;
    copy_strided(run.in<std::uint8_t>(x), 0, {c * plane, r * r * plane, w, r * plane, 1, plane},
                 {n, c / (r * r), h, r, w, r}, size_of(x.dtype), run.out<std::uint8_t>(y));
  });
  op.result(y);
}

}  // namespace

Operators image_operators() {
  return {{"ResizeNearest1d", nearest<1>},
          {"ResizeNearest", nearest<2>},
          {"ResizeNearest3d", nearest<3>},
          {"ResizeBilinear", bilinear},
          {"PixelShuffle", pixel_shuffle}};
}

}  // namespace subbyte::runtime
