#include "convs.hpp"

#include <cstring>

namespace subbyte::runtime {
namespace {

Shape spread_over(Op& op, Shape given, int dims, std::int64_t least, const char* what) {
  if (given.size() == 1) given.resize(dims, given[0]);
  if (given.size() != static_cast<std::size_t>(dims))
    op.fail(std::string(what) + " has no size for each dimension");
  for (const std::int64_t size : given)
    if (size < least || size >= std::int64_t{1} << 31)
      op.fail(std::string(what) + " is " + text_of(given));
  return given;
}

}  // namespace

ConvSettings conv_settings(Op& op, int dims, std::int64_t groups, Shape stride, Shape padding,
                           Shape dilation) {
  ConvSettings found;
  found.dims = dims, found.groups = groups;
  if (groups < 1 || groups >= std::int64_t{1} << 31)
    op.fail("groups are " + std::to_string(groups));
  found.stride = spread_over(op, stride, dims, 1, "the stride");
  found.padding = found.after = spread_over(op, padding, dims, 0, "the padding");
  found.dilation = spread_over(op, dilation, dims, 1, "the dilation");
  found.extra.assign(dims, 0);
  return found;
}

void pad_same(ConvSettings& settings, const Shape& kernel) {
  for (int d = 0; d < settings.dims; ++d) {
    const std::int64_t total = settings.dilation[d] * (kernel[d] - 1);
    settings.padding[d] = total / 2;
    settings.after[d] = total - total / 2;
  }
}

Geometry geometry_of(Op& op, const ConvSettings& s, const Value& x, const Shape& weight,
                     bool transposed) {
  if (x.rank() != s.dims + 2 || static_cast<int>(weight.size()) != s.dims + 2)
    op.fail("x is " + text_of(x.shape) + ", the weight " + text_of(weight));
  Geometry g;
  g.groups = s.groups;
  g.channels = x.shape[1];
  g.out_channels = transposed ? weight[1] * s.groups : weight[0];
  const std::int64_t in = transposed ? weight[0] : weight[1] * s.groups;
  if (in != g.channels || g.channels % s.groups || g.out_channels % s.groups || g.channels < 1 ||
      g.out_channels < 1)
    op.fail("x is " + text_of(x.shape) + "; dimension 1 must be " + std::to_string(in));
  for (int d = 0; d < s.dims; ++d) {
    const int place = 3 - s.dims + d;
    const std::int64_t size = x.shape[2 + d], kernel = weight[2 + d];
    if (kernel < 1 || kernel >= std::int64_t{1} << 31 || size < 1)
      op.fail("x or the weight is empty");
    const std::int64_t reach = s.dilation[d] * (kernel - 1);
    g.in[place] = size, g.kernel[place] = kernel, g.stride[place] = s.stride[d];
    g.dilation[place] = s.dilation[d], g.before[place] = s.padding[d];
    const std::int64_t room = size + s.padding[d] + s.after[d] - reach - 1;
    g.out[place] =
        transposed ? (size - 1) * s.stride[d] - s.padding[d] - s.after[d] + reach + 1 + s.extra[d]
                   : room / s.stride[d] + 1;
    if ((!transposed && room < 0) || g.out[place] < 1)
      op.fail("x is " + text_of(x.shape) + ", smaller than the kernel " + text_of(weight));
  }
  return g;
}

Shape result_of(const Geometry& g, const Value& x, int dims) {
  Shape shape{x.shape[0], g.out_channels};
  for (int d = 0; d < dims; ++d) shape.push_back(g.out[3 - dims + d]);
  return shape;
}

namespace {

// Where place i of a padded dimension comes from; -1: from nowhere.
std::int64_t source(std::int64_t i, std::int64_t before, std::int64_t size,
                    const std::string& mode) {
  const std::int64_t at = i - before;
  if (at >= 0 && at < size) return at;
  if (mode == "constant") return -1;
  if (mode == "replicate") return at < 0 ? 0 : size - 1;
  if (mode == "circular") return (at % size + size) % size;
  return at < 0 ? -at : 2 * (size - 1) - at;
}

}  // namespace

Value padded(Op& op, const Value& x, const Shape& pads, const std::string& mode, double value) {
  if (pads.size() % 2 || pads.size() > 2 * x.shape.size()) op.fail("pads are " + text_of(pads));
  if (mode != "constant" && mode != "reflect" && mode != "replicate" && mode != "circular")
    op.fail("padding mode '" + shown(mode) + "' is unknown");
  if (std::all_of(pads.begin(), pads.end(), [](std::int64_t pad) { return pad == 0; })) return x;
  Shape shape = x.shape;
  std::vector<std::vector<std::int64_t>> from(shape.size());
  for (std::size_t d = 0; d < shape.size(); ++d) {
    const std::size_t i = 2 * (shape.size() - 1 - d);
    const std::int64_t before = i < pads.size() ? pads[i] : 0;
    const std::int64_t after = i < pads.size() ? pads[i + 1] : 0, size = shape[d];
    constexpr std::int64_t kMost = std::int64_t{1} << 31;
    const std::int64_t least = mode == "constant" ? -size : 0;
    const std::int64_t most = mode == "reflect" ? size - 1 : mode == "circular" ? size : kMost;
    if (before || after) {
      if (before < least || after < least || before > most || after > most ||
          (size < 1 && mode != "constant"))
        op.fail("a dimension of " + std::to_string(size) + " cannot be padded by " + text_of(pads));
    }
    shape[d] = size + before + after;
    count_of(shape);
    if (shape[d] > std::int64_t{1} << 31) op.fail("pads are " + text_of(pads));
    for (std::int64_t k = 0; k < shape[d]; ++k) from[d].push_back(source(k, before, size, mode));
  }
  const Value y = op.make(x.dtype, shape);
  const Shape strides = strides_of(x.shape);
  const Value fill = op.number(value, x.dtype);
  op.step({x, fill}, {y}, [x, y, fill, from, strides](const Run& run) {
    const std::size_t size = size_of(x.dtype), rank = y.shape.size();
    const std::uint8_t *in = run.in<std::uint8_t>(x), *other = run.in<std::uint8_t>(fill);
    std::uint8_t* out = run.out<std::uint8_t>(y);
    const std::int64_t inner = y.shape[rank - 1], rows = inner ? y.count() / inner : 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      std::int64_t rest = row, place = 0;
      bool inside = true;
      for (std::size_t d = rank - 1; d-- > 0; rest /= y.shape[d]) {
        const std::int64_t at = from[d][rest % y.shape[d]];
        inside = inside && at >= 0;
        place += at * strides[d];
      }
      for (std::int64_t i = 0; i < inner;) {  // neighbours that come from neighbours together
        const std::int64_t at = inside ? from[rank - 1][i] : -1;
        std::int64_t n = 1;
        if (at >= 0)
          while (i + n < inner && from[rank - 1][i + n] == at + n) ++n;
        std::memcpy(out, at >= 0 ? in + (place + at) * size : other, n * size);
        i += n, out += n * size;
      }
    }
  });
  return y;
}

}  // namespace subbyte::runtime
