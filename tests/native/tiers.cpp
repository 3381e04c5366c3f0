// Every tier of this binary against plain loops over the codes: integers, so equal or wrong.
//
// It needs no Python, so that it runs where only a compiler and an emulator are: AVX-512 and
// AVX-VNNI under SIMDe (make test-avx512), ARM under QEMU (make test-neon), any tier under
// sanitizers (make test-san).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "activations.hpp"
#include "conv.hpp"
#include "dispatch.hpp"
#include "linear.hpp"
#include "origin.hpp"
#include "panels.hpp"
#include "radix.hpp"
#include "roofs.hpp"

using namespace subbyte;

namespace {

std::mt19937 generator(1);
long checks = 0;

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

template <class... A>
void require(bool holds, const char* format, A... arguments) {
  ++checks;
  if (holds) return;
  std::fprintf(stderr, format, arguments...);
  std::fputc('\n', stderr);
  std::exit(1);
}

int digits_of(int levels) {
  int digits = 0;
  for (long double value = levels; value <= 18446744073709551616.0L; value *= levels) ++digits;
  return digits;
}

struct Weight {
  int levels, rows, k;
  std::vector<std::uint8_t> codes, words;
  std::vector<float> scale;
  Affine affine;
  std::vector<std::int32_t> order;

  Weight(int levels, int rows, int k) : levels(levels), rows(rows), k(k), scale(rows) {
    for (int i = 0; i < rows * k; ++i)
      codes.push_back(static_cast<std::uint8_t>(draw(0, levels - 1)));
    const int digits = digits_of(levels);
    words.resize(8 * ((codes.size() + digits - 1) / digits));
    radix_pack(codes.data(), codes.size(), levels, digits, words.data());
    for (float& s : scale) s = 0.5f + static_cast<float>(draw(0, 100)) / 100;
    affine = levels % 2 ? Affine{1, (levels - 1) / 2} : Affine{2, levels - 1};
    for (int i = 0; i < k; ++i) order.push_back(i);
  }
  RadixCodes stored() const {
    return {words.data(), words.size(), static_cast<unsigned>(levels),
            static_cast<unsigned>(digits_of(levels))};
  }
  int value(int row, int i) const { return affine.factor * codes[row * k + i] - affine.center; }
};

std::vector<float> floats(std::size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& value : x) value = normal(generator);
  return x;
}

// One column, as the drivers round it; q is padded with the zero of `flip`.
Quantized quantize(const Kernels& tier, const float* x, int n, std::uint8_t flip, std::int8_t* q) {
  const Quantized of = scale_of(tier.peak(x, n));
  round_planes(tier, x, n, of, flip, 1, q, 0);
  return of;
}

void check_quantize(const Kernels& tier) {
  for (const int n : {1, 7, 64, 1000}) {
    const std::vector<float> x = floats(n);
    for (const int flip : {0, 0x80}) {
      std::vector<std::int8_t> q(n);
      const Quantized of = quantize(tier, x.data(), n, flip, q.data());
      float peak = 0;
      for (const float value : x) peak = std::fmax(peak, std::fabs(value));
      require(of.fits && of.scale == peak / 127.0f, "%s: scale of %d values", tier.name, n);
      const float inverse = 127.0f / peak;
      int sum = 0;
      for (int i = 0; i < n; ++i) {
        const int wanted = static_cast<int>(std::nearbyint(x[i] * inverse));
        require(static_cast<std::int8_t>(q[i] ^ flip) == wanted, "%s: value %d", tier.name, i);
        sum += wanted;
      }
      if (!flip) require(tier.sum(q.data(), n) == sum, "%s: sum", tier.name);
    }
  }
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity(), 1e-40f, 0.0f}) {
    std::vector<float> x(40, std::fabs(bad) < 1 ? bad : 1.0f);
    x[17] = bad;
    std::vector<std::int8_t> q(40, 99);
    const Quantized of = quantize(tier, x.data(), 40, 0x80, q.data());
    require(of.fits == (bad == 0.0f) && of.scale == 0.0f, "%s: %g has a scale", tier.name, bad);
    for (const std::int8_t value : q)
      require(static_cast<std::uint8_t>(value) == 0x80, "%s: %g is not 0", tier.name, bad);
  }
}

void check_products(const Kernels& tier, int levels, int rows, int k) {
  const Weight weight(levels, rows, k);
  const Panel panel = make_panel(weight.stored(), 0, rows, k, weight.order, weight.scale.data(),
                                 weight.affine, tier.tables);
  const int length = static_cast<int>(panel.groups() * panel.traits().group());
  std::vector<std::vector<std::int8_t>> q(kMaxTile, std::vector<std::int8_t>(length, 0));
  for (auto& column : q)
    for (int i = 0; i < k; ++i)
      column[i] = static_cast<std::int8_t>(draw(0, 3) ? draw(-127, 127) : 127);
  std::vector<std::int32_t> sums(kMaxTile * kBlockRows);
  std::vector<std::int8_t> decoded(length * kBlockRows);
  for (std::int64_t block = 0; block < panel.blocks(); ++block) {
    const auto dot = [&](int row, const std::vector<std::int8_t>& x, bool codes) {
      long sum = 0;
      for (int i = 0; i < k; ++i)
        sum += (codes ? weight.codes[row * k + i] : weight.value(row, i)) * x[i];
      return sum;
    };
    for (int n = 1; n <= kMaxSmall; ++n) {
      const std::int8_t* x[kMaxSmall];
      for (int c = 0; c < n; ++c) x[c] = q[c].data();
      tier.small(panel, block, x, n, sums.data());
      for (int c = 0; c < n; ++c)
        for (int r = 0; r < kBlockRows && block * kBlockRows + r < rows; ++r)
          require(sums[c * kBlockRows + r] == dot(block * kBlockRows + r, q[c], true),
                  "%s: small, %d levels, %d x %d, column %d of %d, row %d", tier.name, levels, rows,
                  k, c, n, r);
    }
    tier.decode(panel, block, decoded.data());
    for (int i = 0; i < length; ++i)
      for (int r = 0; r < kBlockRows; ++r) {
        const int row = static_cast<int>(block) * kBlockRows + r;
        if (row >= rows) continue;
        require(decoded[i / 4 * kRunBytes + 4 * r + i % 4] == (i < k ? weight.value(row, i) : 0),
                "%s: decode, %d levels, row %d, k %d", tier.name, levels, row, i);
      }
    std::vector<std::vector<std::uint8_t>> flipped;
    const std::uint8_t* x[kMaxTile];
    for (auto& column : q) {
      flipped.emplace_back(length);
      for (int i = 0; i < length; ++i)
        flipped.back()[i] = static_cast<std::uint8_t>(column[i] ^ tier.flip);
    }
    for (int c = 0; c < kMaxTile; ++c) x[c] = flipped[c].data();
    const std::int32_t first = length / 8, lengths[2] = {first, length / 4 - first};
    const std::int64_t offsets[2] = {0, 4 * first};
    tier.multiply(decoded.data(), panel.max_abs, rows - block * kBlockRows,
                  Runs{2, offsets, lengths}, x, sums.data());
    for (int c = 0; c < tier.tile; ++c)
      for (int r = 0; r < kBlockRows && block * kBlockRows + r < rows; ++r) {
        const int row = static_cast<int>(block) * kBlockRows + r;
        const long excess = panel.excess(tier.flip, block)[r];
        require(sums[c * kBlockRows + r] - excess == dot(row, q[c], false),
                "%s: multiply, %d levels, %d x %d, column %d, row %d", tier.name, levels, rows, k,
                c, r);
      }
  }
}

// Rows so long that sums of digits that stay where they lie would leave 32 bits on their way.
void check_long_rows(const Kernels& tier, int levels, int k) {
  Weight weight(levels, 1, 1);
  const int digits = digits_of(levels);
  weight.codes.assign(k, static_cast<std::uint8_t>(levels - 1));
  weight.words.resize(8 * ((weight.codes.size() + digits - 1) / digits));
  radix_pack(weight.codes.data(), k, levels, digits, weight.words.data());
  for (int i = 1; i < k; ++i) weight.order.push_back(i);
  const Panel panel = make_panel(weight.stored(), 0, 1, k, weight.order, weight.scale.data(),
                                 weight.affine, tier.tables);
  const std::int64_t length = panel.groups() * panel.traits().group();
  std::vector<std::int8_t> high(length, 0), low(length, 0);
  for (int i = 0; i < k; ++i) high[i] = 127, low[i] = -127;
  const std::int8_t* x[4] = {high.data(), low.data(), high.data(), low.data()};
  std::int32_t sums[4 * kBlockRows];
  for (int n = 1; n <= 4; ++n) {
    tier.small(panel, 0, x, n, sums);
    for (int c = 0; c < n; ++c)
      require(sums[c * kBlockRows] == 127L * (levels - 1) * k * (c % 2 ? -1 : 1),
              "%s: %d levels, rows of %d, column %d of %d", tier.name, levels, k, c, n);
  }
}

// Whole layers: the drivers' indexing, against the same product of rounded activations.
void check_linear(const Kernels& tier, int levels, int rows, int k, int n) {
  const Weight weight(levels, rows, k);
  const Panel panel = make_panel(weight.stored(), 0, rows, k, weight.order, weight.scale.data(),
                                 weight.affine, tier.tables);
  const std::vector<float> x = floats(n * k), bias = floats(rows);
  const std::vector<float> plus = floats(n * rows);
  std::vector<float> y(n * rows), more(n * rows);
  Finish finish{bias.data()};
  const auto odd = linear(tier, panel, x.data(), n, y.data(), finish, Precision::kInt8, 2);
  require(odd.empty(), "%s: linear found odd rows", tier.name);
  finish.plus = plus.data(), finish.low = -0.5f, finish.high = 0.25f;
  linear(tier, panel, x.data(), n, more.data(), finish, Precision::kInt8, 2);
  std::vector<float> single(n * rows);
  linear(tier, panel, x.data(), n, single.data(), finish, Precision::kFloat32, 2);
  std::vector<std::int8_t> q(k);
  for (int i = 0; i < n; ++i) {
    const Quantized of = quantize(tier, x.data() + i * k, k, 0, q.data());
    for (int r = 0; r < rows; ++r) {
      long sum = 0;
      for (int j = 0; j < k; ++j) sum += static_cast<long>(weight.value(r, j)) * q[j];
      double exact = bias[r] + plus[i * rows + r], size = std::fabs(bias[r]) + 1;
      for (int j = 0; j < k; ++j) {
        const double term = double{weight.scale[r]} * weight.value(r, j) * x[i * k + j];
        exact += term, size += std::fabs(term);
      }
      exact = std::min<double>(std::max<double>(exact, finish.low), finish.high);
      require(std::fabs(single[i * rows + r] - exact) <= (k + 6) * 6e-8 * size,
              "%s: linear in float32, %d levels, %d x %d, row %d of %d", tier.name, levels, rows, k,
              i, n);
      const float product = static_cast<float>(sum) * (of.scale * weight.scale[r]);
      require(y[i * rows + r] == product + bias[r], "%s: linear, %d levels, %d x %d, row %d of %d",
              tier.name, levels, rows, k, i, n);
      const float sums = product + (bias[r] + plus[i * rows + r]);
      require(more[i * rows + r] == std::min(std::max(sums, finish.low), finish.high),
              "%s: finished linear, %d levels, %d x %d, row %d of %d", tier.name, levels, rows, k,
              i, n);
    }
  }
}

// The same where weights of a row share scales: sums of each group, scaled and added up in order.
void check_groups(const Kernels& tier, int levels, int rows, int k, int n, int shared) {
  Weight weight(levels, rows, k);
  const int count = (k + shared - 1) / shared;
  weight.scale.resize(rows * count);
  for (float& s : weight.scale) s = 0.5f + static_cast<float>(draw(0, 100)) / 100;
  const float unit = 1.0f / static_cast<float>(levels - 1);
  if (shared == 32)  // float16 as well
    for (float& s : weight.scale) s = std::nearbyint(s * 64) / 64;
  const Panel panel = make_panel_of_groups(weight.stored(), rows, k, shared, weight.scale.data(),
                                           unit, weight.affine, tier.tables);
  require(panel.half.empty() == (shared != 32), "%s: scales in float16", tier.name);
  require(panel.inputs() == k && panel.scales_of_row() == count, "%s: groups of %d", tier.name,
          shared);
  const std::vector<float> x = floats(n * k), bias = floats(rows);
  std::vector<float> y(n * rows), single(n * rows);
  const Finish finish{bias.data()};
  linear(tier, panel, x.data(), n, y.data(), finish, Precision::kInt8, 2);
  linear(tier, panel, x.data(), n, single.data(), finish, Precision::kFloat32, 2);
  std::vector<std::int8_t> q(k);
  for (int i = 0; i < n; ++i) {
    const Quantized of = quantize(tier, x.data() + i * k, k, 0, q.data());
    for (int r = 0; r < rows; ++r) {
      float product = 0.0f;
      double exact = bias[r], size = std::fabs(bias[r]);
      for (int s = 0; s < count; ++s) {
        const float scale = weight.scale[r * count + s];
        long sum = 0;
        for (int j = s * shared; j < std::min(k, (s + 1) * shared); ++j) {
          sum += static_cast<long>(weight.value(r, j)) * q[j];
          const double term = double{unit} * scale * weight.value(r, j) * x[i * k + j];
          exact += term, size += std::fabs(term);
        }
        product += static_cast<float>(sum) * scale;
      }
      require(y[i * rows + r] == product * (of.scale * unit) + bias[r],
              "%s: groups of %d, %d levels, %d x %d, row %d of %d", tier.name, shared, levels, rows,
              k, i, n);
      require(std::fabs(single[i * rows + r] - exact) <= (k + 8) * 6e-8 * size,
              "%s: groups of %d in float32, %d levels, %d x %d, row %d of %d", tier.name, shared,
              levels, rows, k, i, n);
    }
  }
}

void check_conv(const Kernels& tier, int levels, const ConvShape& s, int n, int h, int w) {
  const int in = static_cast<int>(s.in_group()), rows = static_cast<int>(s.out_channels);
  const int kh = static_cast<int>(s.kernel_h), kw = static_cast<int>(s.kernel_w);
  const Weight weight(levels, rows, in * kh * kw);
  const ConvPanels panels(s, weight.stored(), weight.scale.data(), weight.affine, tier.tables);
  const int oh = static_cast<int>(s.out_h(h)), ow = static_cast<int>(s.out_w(w));
  const int c_all = static_cast<int>(s.channels);
  const std::vector<float> x = floats(n * c_all * h * w), bias = floats(rows);
  const std::vector<float> plus = floats(n * rows * oh * ow);
  std::vector<float> turned(x.size()), y(plus.size()), y_last(plus.size());
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < c_all; ++c)
      for (int p = 0; p < h * w; ++p)
        turned[(i * h * w + p) * c_all + c] = x[(i * c_all + c) * h * w + p];
  Finish finish{bias.data()};
  conv2d(tier, panels, x.data(), n, h, w, y.data(), false, finish, Precision::kInt8, 2);
  finish.plus = plus.data(), finish.low = -0.5f, finish.high = 0.25f;
  std::vector<float> y_finished(y.size());
  conv2d(tier, panels, x.data(), n, h, w, y_finished.data(), false, finish, Precision::kInt8, 2);
  conv2d(tier, panels, turned.data(), n, h, w, y_last.data(), true, finish, Precision::kInt8, 2);
  std::vector<float> single(y.size()), single_last(y.size());
  const Finish biased{bias.data()};
  conv2d(tier, panels, x.data(), n, h, w, single.data(), false, biased, Precision::kFloat32, 2);
  conv2d(tier, panels, turned.data(), n, h, w, single_last.data(), true, biased,
         Precision::kFloat32, 2);
  std::vector<std::int8_t> q(c_all * h * w);
  for (int i = 0; i < n; ++i) {
    const int size = c_all * h * w;
    const Quantized of = quantize(tier, x.data() + i * size, size, 0, q.data());
    for (int r = 0; r < rows; ++r)
      for (int oy = 0; oy < oh; ++oy)
        for (int ox = 0; ox < ow; ++ox) {
          long sum = 0;
          float exact = bias[r];  // tap after tap, as depthwise convolutions add up
          double truth = bias[r], reach = std::fabs(bias[r]);
          const int group = r / (rows / static_cast<int>(s.groups));
          for (int c = 0; c < in; ++c)
            for (int ky = 0; ky < kh; ++ky)
              for (int kx = 0; kx < kw; ++kx) {
                const int iy = oy * static_cast<int>(s.stride_h) +
                               ky * static_cast<int>(s.dilation_h) - static_cast<int>(s.top);
                const int ix = ox * static_cast<int>(s.stride_w) +
                               kx * static_cast<int>(s.dilation_w) - static_cast<int>(s.left);
                if (iy < 0 || ix < 0 || iy >= h || ix >= w) continue;
                const long w_integer = weight.value(r, (c * kh + ky) * kw + kx);
                const int from = ((group * in + c) * h + iy) * w + ix;
                sum += w_integer * q[from];
                exact += static_cast<float>(w_integer) * weight.scale[r] * x[i * size + from];
                const double term = double{weight.scale[r]} * w_integer * x[i * size + from];
                truth += term, reach += std::fabs(term);
              }
          const int last = ((i * oh + oy) * ow + ox) * rows + r;
          const double bound = (in * kh * kw + 6) * 6e-8 * reach;
          require(std::fabs(single_last[last] - truth) <= bound &&
                      std::fabs(single[((i * rows + r) * oh + oy) * ow + ox] - truth) <= bound,
                  "%s: conv in float32, %d levels, image %d, channel %d, pixel %d %d", tier.name,
                  levels, i, r, oy, ox);
          const float product = static_cast<float>(sum) * (of.scale * weight.scale[r]);
          const float value = s.depthwise() ? exact : product + bias[r];
          const auto finished = [&](float more) {
            const float sums = s.depthwise() ? exact + more : product + (bias[r] + more);
            return std::min(std::max(sums, finish.low), finish.high);
          };
          const int first = ((i * rows + r) * oh + oy) * ow + ox;
          require(y[first] == value, "%s: conv, %d levels, image %d, channel %d, pixel %d %d",
                  tier.name, levels, i, r, oy, ox);
          require(
              y_last[last] == finished(plus[last]) && y_finished[first] == finished(plus[first]),
              "%s: finished conv, %d levels, image %d, channel %d, pixel %d %d", tier.name, levels,
              i, r, oy, ox);
        }
  }
}

template <class F>
void refused(const char* what, F&& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    ++checks;
    return;
  } catch (const std::bad_alloc&) {
    ++checks;
    return;
  }
  require(false, "not refused: %s", what);
}

// What no caller may ask for. Under sanitizers an overflow or a read past an end would end the run.
void check_refusals(const Kernels& tier) {
  constexpr std::int64_t kHuge = std::int64_t{1} << 62;
  const Weight weight(3, 8, 60);
  for (const unsigned levels : {0u, 1u, 257u}) refused("levels", [&] { check_radix(levels, 40); });
  for (const unsigned digits : {0u, 39u, 41u}) refused("digits", [&] { check_radix(3, digits); });
  const auto panel = [&](std::int64_t first, std::int64_t rows, std::int64_t length,
                         const std::vector<std::int32_t>& order, Affine affine) {
    return make_panel(weight.stored(), first, rows, length, order, weight.scale.data(), affine,
                      tier.tables);
  };
  const auto wrong = [&](std::int64_t first, std::int64_t rows, std::int64_t length) {
    refused("rows", [&] { panel(first, rows, length, weight.order, weight.affine); });
  };
  wrong(-1, 8, 60), wrong(1, 8, 60), wrong(0, 0, 60), wrong(0, -8, 60), wrong(0, 8, 0);
  wrong(0, 8, kHuge), wrong(0, kHuge, 60), wrong(kHuge, kHuge, 60), wrong(kHuge, 8, 60);
  for (const std::int32_t from : {-2, 60})
    refused("order", [&] { panel(0, 8, 60, {from}, weight.affine); });
  refused("order", [&] { panel(0, 8, 60, {}, weight.affine); });
  for (const Affine affine : {Affine{0, 1}, Affine{3, 1}, Affine{1, 128}, Affine{1, -126}})
    refused("affine", [&] { panel(0, 8, 60, weight.order, affine); });

  for (const std::int64_t shared : {std::int64_t{0}, std::int64_t{-4}, std::int64_t{6}})
    refused("groups", [&] {
      make_panel_of_groups(weight.stored(), 8, 60, shared, weight.scale.data(), 1.0f, weight.affine,
                           tier.tables);
    });
  const ConvShape right{60, 8, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1};
  const auto conv = [&](const ConvShape& shape) {
    return ConvPanels(shape, weight.stored(), weight.scale.data(), weight.affine, tier.tables);
  };
  for (std::int64_t ConvShape::* size :
       {&ConvShape::channels, &ConvShape::out_channels, &ConvShape::kernel_h, &ConvShape::kernel_w,
        &ConvShape::stride_h, &ConvShape::stride_w, &ConvShape::dilation_h, &ConvShape::dilation_w,
        &ConvShape::groups})
    for (const std::int64_t value : {std::int64_t{0}, std::int64_t{-1}, kHuge}) {
      ConvShape shape = right;
      shape.*size = value;
      refused("a size of a convolution", [&] { conv(shape); });
    }
  for (std::int64_t ConvShape::* pad :
       {&ConvShape::top, &ConvShape::bottom, &ConvShape::left, &ConvShape::right})
    for (const std::int64_t value : {std::int64_t{-1}, kHuge}) {
      ConvShape shape = right;
      shape.*pad = value;
      refused("padding", [&] { conv(shape); });
    }
  ConvShape shape = right;
  shape.groups = 7;
  refused("groups", [&] { conv(shape); });

  const ConvPanels panels = conv(right);
  const Panel rows = panel(0, 8, 60, weight.order, weight.affine);
  std::vector<float> x(60), y(8);
  const auto run = [&](std::int64_t n, std::int64_t h, int threads) {
    return conv2d(tier, panels, x.data(), n, h, 1, y.data(), false, {}, Precision::kInt8, threads);
  };
  refused("small images", [&] { run(1, 0, 1); });
  refused("huge images", [&] { run(1, kHuge, 1); });
  for (const int threads : {0, -1}) {
    refused("threads", [&] { run(1, 1, threads); });
    refused("threads",
            [&] { linear(tier, rows, x.data(), 1, y.data(), {}, Precision::kInt8, threads); });
    refused("threads", [&] { spin_float(1, threads); });
  }
  require(run(0, 1, 1).empty() && run(1, 1, 1 << 30).empty(), "%s: no images", tier.name);
  refused("rounds", [&] { spin_int8(tier.name, -1, 1); });
  refused("rounds", [&] { spin_int8(tier.name, kHuge, 1); });
  refused("a tier", [&] { spin_int8("avx1024", 1, 1); });
  for (const std::size_t bytes : {std::size_t{0}, ~std::size_t{0}, std::size_t{1} << 60})
    refused("bytes", [&] { Stream stream(bytes); });
  refused("passes", [&] { Stream(4096).read(0, 1); });
}

// Bytes to bytes against whole numbers, and the float32 of `conv2d`'s comment; on every tier.
void check_bytes(const Kernels& tier, int levels, const ConvShape& s, int n, int h, int w, int zero,
                 bool sum_with_plus) {
  const int in = static_cast<int>(s.in_group()), rows = static_cast<int>(s.out_channels);
  const int kh = static_cast<int>(s.kernel_h), kw = static_cast<int>(s.kernel_w);
  const Weight weight(levels, rows, in * kh * kw);
  const ConvPanels panels(s, weight.stored(), weight.scale.data(), weight.affine, tier.tables);
  const int oh = static_cast<int>(s.out_h(h)), ow = static_cast<int>(s.out_w(w));
  const int channels = static_cast<int>(s.channels);
  const std::vector<float> bias = floats(rows);
  constexpr int kSlack = 64;  // a vector may be read across the end
  std::vector<std::uint8_t> x(n * h * w * channels + kSlack), plus(n * oh * ow * rows + kSlack);
  for (auto* bytes : {&x, &plus})
    for (std::uint8_t& byte : *bytes) byte = static_cast<std::uint8_t>(draw(zero ? 1 : 0, 255));
  std::vector<std::uint8_t> y(n * oh * ow * rows);
  Images images;
  images.bytes = x.data(), images.scale = {0.02f, static_cast<std::uint8_t>(zero)};
  Target to;
  const float reach = 0.02f * 127 * std::sqrt(static_cast<float>(in * kh * kw)) * levels;
  to.bytes = y.data(), to.scale = {reach / 90, static_cast<std::uint8_t>(128 - zero)};
  if (sum_with_plus) to.plus = plus.data(), to.plus_scale = {reach / 200, images.scale.zero};
  Finish finish{bias.data()};
  finish.low = -0.6f * reach, finish.high = 0.7f * reach;
  conv2d(tier, panels, images, n, h, w, to, finish, Precision::kInt8, 2);
  const float inverse = 1.0f / to.scale.scale;
  const float low = std::max(finish.low * inverse, to.scale.low());
  const float high = std::min(finish.high * inverse, to.scale.high());
  for (int i = 0; i < n; ++i)
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < oh * ow; ++p) {
        const int group = r / (rows / static_cast<int>(s.groups));
        long sum = 0;
        for (int c = 0; c < in; ++c)
          for (int ky = 0; ky < kh; ++ky)
            for (int kx = 0; kx < kw; ++kx) {
              const int iy = p / ow * static_cast<int>(s.stride_h) +
                             ky * static_cast<int>(s.dilation_h) - static_cast<int>(s.top);
              const int ix = p % ow * static_cast<int>(s.stride_w) +
                             kx * static_cast<int>(s.dilation_w) - static_cast<int>(s.left);
              if (iy < 0 || ix < 0 || iy >= h || ix >= w) continue;
              sum += static_cast<long>(weight.value(r, (c * kh + ky) * kw + kx)) *
                     (x[((i * h + iy) * w + ix) * channels + group * in + c] - zero);
            }
        const int place = (i * oh * ow + p) * rows + r;
        float value = static_cast<float>(sum) * (images.scale.scale * weight.scale[r] * inverse) +
                      bias[r] * inverse;
        if (to.plus)
          value += static_cast<float>(plus[place] - zero) * (to.plus_scale.scale * inverse);
        const float wanted = std::nearbyint(std::min(std::max(value, low), high));
        require(y[place] == wanted + to.scale.zero,
                "%s: bytes, %d levels, image %d, channel %d, pixel %d, zero %d", tier.name, levels,
                i, r, p, zero);
      }
}

void check_linear_of_bytes(const Kernels& tier, int levels, int rows, int k, int n, int zero) {
  const Weight weight(levels, rows, k);
  const Panel panel = make_panel(weight.stored(), 0, rows, k, weight.order, weight.scale.data(),
                                 weight.affine, tier.tables);
  std::vector<std::uint8_t> x(n * k);
  for (std::uint8_t& byte : x) byte = static_cast<std::uint8_t>(draw(zero ? 1 : 0, 255));
  std::vector<float> y(n * rows);
  const ByteScale of{0.3f, static_cast<std::uint8_t>(zero)};
  const std::vector<float> bias = floats(rows);
  linear(tier, panel, x.data(), of, n, y.data(), Finish{bias.data()}, 2);
  for (int i = 0; i < n; ++i)
    for (int r = 0; r < rows; ++r) {
      long sum = 0;
      for (int j = 0; j < k; ++j)
        sum += static_cast<long>(weight.value(r, j)) * (x[i * k + j] - zero);
      const float wanted = static_cast<float>(sum) * (of.scale * weight.scale[r]) + bias[r];
      require(y[i * rows + r] == wanted, "%s: linear of bytes, %d levels, row %d of %d, zero %d",
              tier.name, levels, i, n, zero);
    }
}

void check_origin() {
  for (const std::size_t size : {0, 1, 7, 8, 255, 256, 257, 5000}) {
    std::vector<std::uint8_t> bytes(size, 3);
    const Origin origin(bytes.data(), size);
    require(origin.same(bytes.data(), size) && origin.glance(bytes.data(), size), "origin");
    require(!origin.same(bytes.data(), size + 1), "origin of %zu bytes is longer", size);
    for (std::size_t i = 0; i < size; ++i) {
      bytes[i] ^= 1;
      bool seen = false;
      for (std::size_t calls = 0; calls <= size / 1024; ++calls)
        seen |= !origin.glance(bytes.data(), size);
      require(seen && !origin.same(bytes.data(), size), "byte %zu of %zu", i, size);
      bytes[i] ^= 1;
    }
  }
}

}  // namespace

int main() {
  check_origin();
  for (const Kernels* tier : tiers()) {
    checks = 0;
    check_refusals(*tier);
    check_quantize(*tier);
    for (const int levels : {2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 33, 127, 128, 255})
      for (const int rows : {1, 32, 45})
        for (const int k : {1, 31, 100, 700}) check_products(*tier, levels, rows, k);
    for (const int levels : {2, 3, 4, 5}) check_long_rows(*tier, levels, 450'000);
    check_long_rows(*tier, 16, 250'000);
    for (const int levels : {2, 3, 5, 16, 17, 128})
      for (const int n : {1, 5, 8, 9, 30}) check_linear(*tier, levels, 37, 90, n);
    for (const int levels : {2, 3, 4, 5, 8, 16, 17, 128})
      for (const int n : {1, 7, 13})
        for (const int shared : {4, 20, 32, 64}) check_groups(*tier, levels, 37, 150, n, shared);
    const ConvShape shapes[] = {
        {3, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}, {5, 9, 3, 2, 2, 1, 1, 1, 0, 2, 1, 3, 1},
        {8, 40, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1}, {6, 10, 3, 3, 1, 2, 2, 2, 2, 2, 2, 2, 1},
        {8, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 2}, {35, 35, 5, 3, 2, 2, 1, 2, 2, 2, 1, 1, 35},
        {3, 10, 7, 7, 2, 2, 1, 1, 3, 3, 3, 3, 1},
    };
    for (const ConvShape& shape : shapes)
      for (const int levels : {3, 5, 16, 17, 128}) check_conv(*tier, levels, shape, 2, 9, 8);
    // Depthwise: channels that fill no whole vectors, and rows longer than pixels taken together.
    for (const int channels : {1, 3, 5, 7, 8, 12, 16, 20, 24, 31, 33, 40})
      for (const int stride : {1, 2}) {
        const ConvShape shape{channels, channels, 3, 3, stride, stride, 1, 1, 1, 1, 1, 1, channels};
        for (const int width : {3, 8, 23, 41}) check_conv(*tier, 3, shape, 2, 4, width);
      }
    for (const int zero : {0, 128}) {
      for (const ConvShape& shape : shapes)
        for (const int levels : {3, 5, 16, 17, 128})
          for (const bool plus : {false, true})
            check_bytes(*tier, levels, shape, 2, 9, 8, zero, plus);
      for (const int channels : {1, 5, 8, 16, 20, 33, 40}) {
        const ConvShape shape{channels, channels, 3, 3, 2, 1, 1, 1, 1, 1, 1, 1, channels};
        for (const int levels : {3, 17, 128})
          for (const int width : {3, 23})
            check_bytes(*tier, levels, shape, 2, 4, width, zero, true);
      }
      // Weights that leave a core's cache: a block after another.
      check_bytes(*tier, 3, {300, 1000, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1}, 2, 9, 8, zero, true);
      for (const int levels : {2, 3, 5, 16, 17, 128})
        for (const int n : {1, 8, 9, 30}) check_linear_of_bytes(*tier, levels, 37, 90, n, zero);
    }
    std::printf("%s: %ld checks passed\n", tier->name, checks);
  }
}
