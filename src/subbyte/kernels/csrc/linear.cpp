#include "linear.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "arithmetic.hpp"
#include "memory.hpp"
#include "threads.hpp"

namespace subbyte {
namespace {

// The activations of one call, `planes` columns to a row of x.
struct Columns {
  std::int64_t n, length, stride;
  std::int64_t shared, span;  // so many values of a column take so many bytes of it
  int planes;
  std::uint8_t flip;
  int offset;  // what a byte is more than its value, to the products: 0, 128 or -128
  std::int8_t* q;
  std::vector<Quantized> of;  // [n]
  std::vector<float> scale;   // [count()]; 1 for columns in float32

  std::int64_t count() const { return n * planes; }
  const std::int8_t* at(std::int64_t i) const { return q + i * stride; }

  // What sums [32] of products with decoded weights have too much.
  void excess(const Panel& panel, std::int64_t block, std::int32_t* out) const {
    for (int r = 0; r < kBlockRows; ++r)
      out[r] = offset / 128 * panel.excess_of_flip[block * kBlockRows + r];
  }
};

void quantize_rows(const Kernels& kernels, const float* x, int threads, Columns& columns) {
  const std::int64_t k = columns.length, stride = columns.stride;
  parallel(columns.n * k < kSerial / 8 ? 1 : threads, columns.n,
           [&](std::int64_t begin, std::int64_t end) {
             for (std::int64_t i = begin; i < end; ++i) {
               std::int8_t* q = columns.q + i * columns.planes * stride;
               columns.of[i] = scale_of(kernels.peak(x + i * k, k));
               if (stride != k) std::memset(q, columns.flip, columns.planes * stride);
               for (std::int64_t from = 0; from < k; from += columns.shared)
                 round_planes(kernels, x + i * k + from, std::min(columns.shared, k - from),
                              columns.of[i], columns.flip, columns.planes,
                              q + from / columns.shared * columns.span, stride);
               for (int plane = 0; plane < columns.planes; ++plane) {
                 columns.scale[i * columns.planes + plane] = columns.of[i].of_plane(plane);
               }
             }
           });
}

// Where the values of a block of rows go.
struct Sink {
  const Kernels& kernels;
  const Panel& panel;
  const Columns& columns;
  float* y;
  const Finish& finish;
  std::array<float, kBlockRows> units;  // panel.unit

  // Sums of weights that share scales have them already, but for their unit.
  const float* row_scale(std::int64_t row) const {
    return panel.shared ? units.data() : panel.scale.data() + row;
  }

  // The sums [n][32] of columns from `first` on. The planes of a row of x add up.
  template <class Sum>
  void write(std::int64_t block, std::int64_t first, std::int64_t n, const Sum* sums, int factor,
             const std::int32_t* excess) const {
    const std::int64_t row = block * kBlockRows;
    const std::int64_t rows = std::min<std::int64_t>(kBlockRows, panel.rows - row);
    const bool whole = rows == whole_rows(rows);
    alignas(64) float bias[kBlockRows] = {}, value[kBlockRows];
    if (finish.bias) std::memcpy(bias, finish.bias + row, rows * sizeof(float));
    Scaling scaling{factor,  excess,     nullptr,    1,           row_scale(row),  bias,
                    nullptr, panel.rows, finish.low, finish.high, whole_rows(rows)};
    if (columns.planes == 1 && whole) {
      const std::int64_t place = first * panel.rows + row;
      scaling.scale = columns.scale.data() + first;
      if (finish.plus) scaling.plus = finish.plus + place;
      values(kernels, sums, n, scaling, y + place, panel.rows);
      return;
    }
    for (std::int64_t c = first; c < first + n; ++c, sums += kBlockRows) {
      const std::int64_t place = c / columns.planes * panel.rows + row;
      const int plane = static_cast<int>(c % columns.planes);
      const bool done = plane == columns.planes - 1;
      const float* plus = plane ? y + place : finish.plus ? finish.plus + place : nullptr;
      if (plus) std::memcpy(value, plus, rows * sizeof(float));
      scaling.scale = columns.scale.data() + c;
      scaling.bias = plane ? nullptr : bias;
      scaling.plus = plus ? value : nullptr;
      scaling.low = done ? finish.low : -Finish::kInfinity;
      scaling.high = done ? finish.high : Finish::kInfinity;
      values(kernels, sums, 1, scaling, value, kBlockRows);
      std::memcpy(y + place, value, rows * sizeof(float));
    }
  }
};

void few_columns(const Kernels& kernels, const Panel& panel, const Columns& columns,
                 const Sink& sink, int threads) {
  const int n = static_cast<int>(columns.count());
  std::int32_t center[kMaxSmall];
  const std::int8_t* x[kMaxSmall];
  for (int c = 0; c < n; ++c) {
    x[c] = columns.at(c);
    center[c] = panel.affine.center * kernels.sum(x[c], columns.length);
  }
  parallel(threads, panel.blocks(), [&](std::int64_t begin, std::int64_t end) {
    alignas(64) std::int32_t sums[kMaxSmall * kBlockRows], excess[kBlockRows];
    for (std::int64_t b = begin; b < end; ++b) {
      kernels.small(panel, b, x, n, sums);
      for (int c = 0; c < n; ++c) {
        columns.excess(panel, b, excess);
        for (std::int32_t& own : excess) own += center[c];
        sink.write(b, c, 1, sums + c * kBlockRows, panel.affine.factor, excess);
      }
    }
  });
}

// The same where weights of a row share scales.
void few_columns_of_groups(const Kernels& kernels, const Panel& panel, const Columns& columns,
                           const Sink& sink, int threads) {
  const int n = static_cast<int>(columns.count());
  const std::int64_t count = panel.scales_of_row(), span = panel.span();
  std::vector<std::int32_t> of_columns(n * count);
  const std::int32_t* excess[kMaxSmall];
  const std::int8_t* x[kMaxSmall];
  for (int c = 0; c < n; ++c) {
    x[c] = columns.at(c), excess[c] = of_columns.data() + c * count;
    for (std::int64_t s = 0; s < count; ++s)
      of_columns[c * count + s] =
          panel.affine.center *
          kernels.sum(x[c] + s * span, std::min(span, columns.stride - s * span));
  }
  parallel(threads, panel.blocks(), [&](std::int64_t begin, std::int64_t end) {
    alignas(64) float values[kMaxSmall * kBlockRows];
    for (std::int64_t b = begin; b < end; ++b) {
      kernels.small_groups(panel, b, x, n, excess, values);
      sink.write(b, 0, n, values, 1, panel.excess(0, b));
    }
  });
}

// Products of a decoded block with columns of bytes, or of floats; what they have too much is taken
// off already where weights of a row share scales.
struct Block {
  const Kernels& kernels;
  const Panel& panel;
  std::int64_t at;
  const std::int8_t* decoded;
  const std::int32_t* excess;  // [scales][32], of weights that share them

  void write(std::int64_t first, std::int64_t n, const Runs& runs, const std::int8_t*,
             const std::uint8_t* const* column, const Sink& sink) const {
    if (panel.shared) {
      alignas(64) float values[kMaxTile * kBlockRows];
      kernels.multiply_groups(panel, at, decoded, excess, column, values);
      return sink.write(at, first, n, values, 1, panel.excess(0, at));
    }
    alignas(64) std::int32_t sums[kMaxTile * kBlockRows] = {}, too_much[kBlockRows];
    kernels.multiply(decoded, panel.max_abs, rows(), runs, column, sums);
    sink.columns.excess(panel, at, too_much);
    sink.write(at, first, n, sums, 1, too_much);
  }
  void write(std::int64_t first, std::int64_t n, const Runs& runs, const float* weights,
             const std::uint8_t* const* column, const Sink& sink) const {
    alignas(64) float sums[kMaxTile * kBlockRows] = {};
    kernels.multiply_float(weights, rows(), runs, n, column, sums);
    sink.write(at, first, n, sums, 1, panel.excess(0, at));
  }

 private:
  std::int64_t rows() const { return panel.rows - at * kBlockRows; }
};

// x: columns of T, `stride` apart.
template <class T>
void many_columns(const Kernels& kernels, const Panel& panel, const Columns& columns, const T* x,
                  std::int64_t stride, const Sink& sink, int threads) {
  const std::int64_t offset = 0, length = panel.groups() * panel.traits().group();
  // In groups of 4 bytes: 4 activations, or a float.
  const std::int32_t groups =
      static_cast<std::int32_t>(sizeof(T) == 1 ? length / 4 : panel.inputs());
  const Runs runs{1, &offset, &groups};
  // A block's weights are decoded once for all columns, unless there are fewer blocks than threads.
  const std::int64_t tiles = (columns.count() + kernels.tile - 1) / kernels.tile;
  const std::int64_t parts = panel.blocks() >= threads ? 1 : std::min<std::int64_t>(threads, tiles);
  parallel(threads, panel.blocks() * parts, [&](std::int64_t begin, std::int64_t end) {
    thread_local Buffer scratch, wide, more;
    auto* decoded = reinterpret_cast<std::int8_t*>(scratch.reserve(length * kBlockRows));
    auto* excess = reinterpret_cast<std::int32_t*>(
        more.reserve(panel.scales_of_row() * kBlockRows * sizeof(std::int32_t)));
    const std::uint8_t* column[kMaxTile];
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t block = task / parts, part = task % parts;
      kernels.decode(panel, block, decoded);
      if (panel.shared && sizeof(T) == 1) kernels.excess(panel, decoded, excess);
      const T* weights = weights_as<T>(kernels, panel, block, decoded, wide);
      const Block product{kernels, panel, block, decoded, excess};
      for (std::int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
        const std::int64_t first = tile * kernels.tile;
        const std::int64_t n = std::min<std::int64_t>(kernels.tile, columns.count() - first);
        for (int c = 0; c < kernels.tile; ++c)
          column[c] = reinterpret_cast<const std::uint8_t*>(x + (first + (c < n ? c : 0)) * stride);
        product.write(first, n, runs, weights, column, sink);
      }
    }
  });
}

}  // namespace

std::vector<std::int64_t> linear(const Kernels& kernels, const Panel& panel, const float* x,
                                 std::int64_t n, float* y, const Finish& finish,
                                 Precision precision, int threads) {
  threads = team_of(threads);
  if (n == 0) return {};
  thread_local Buffer scratch;
  const bool single = precision == Precision::kFloat32;
  const int planes = planes_of(precision);
  const std::int64_t stride = panel.groups() * panel.traits().group();
  const std::int64_t k = panel.inputs(), shared = panel.shared ? panel.shared : k;
  const int offset = kernels.flip;
  Columns columns{n,      k,       stride, shared, panel.span(), planes, kernels.flip,
                  offset, nullptr, {},     {}};
  columns.scale.assign(n * planes, 1.0f);
  Sink sink{kernels, panel, columns, y, finish, {}};
  sink.units.fill(panel.unit);
  const std::int64_t cost = columns.count() * panel.rows * k * (single ? 4 : 1);
  // Of a few columns all is one parallel loop: it pays sooner.
  const int team = cost < (columns.count() <= kMaxSmall ? kSerial / 2 : kSerial) ? 1 : threads;
  if (single) {
    many_columns(kernels, panel, columns, x, k, sink, team);
    const float most = static_cast<float>(panel.max_abs) * (panel.shared ? panel.max_scale : 1.0f);
    std::vector<std::int64_t> odd;
    for (std::int64_t i = 0; i < n; ++i)
      if (may_overflow(kernels.peak(x + i * k, k), k, most)) odd.push_back(i);
    return odd;
  }
  const bool few = columns.count() <= kMaxSmall;
  if (few) columns.flip = 0, columns.offset = 0;
  columns.q = reinterpret_cast<std::int8_t*>(scratch.reserve(n * planes * stride));
  columns.of.resize(n);
  quantize_rows(kernels, x, team, columns);
  if (few && panel.shared)
    few_columns_of_groups(kernels, panel, columns, sink, team);
  else if (few)
    few_columns(kernels, panel, columns, sink, team);
  else
    many_columns(kernels, panel, columns, columns.q, stride, sink, team);
  std::vector<std::int64_t> odd;
  for (std::int64_t i = 0; i < n; ++i)
    if (!columns.of[i].fits || !panel.scales(columns.of[i].scale)) odd.push_back(i);
  return odd;
}

void linear(const Kernels& kernels, const Panel& panel, const std::uint8_t* x, ByteScale of,
            std::int64_t n, float* y, const Finish& finish, int threads) {
  threads = team_of(threads);
  if (n == 0) return;
  thread_local Buffer scratch;
  const std::int64_t stride = panel.groups() * panel.traits().group(), k = panel.inputs();
  const bool few = n <= kMaxSmall;  // they are multiplied as signed bytes
  const std::uint8_t turn = few ? 0x80 : kernels.flip ^ 0x80;
  Columns columns{n,       k,  stride, k, panel.span(), 1, 0, turn ? of.zero - 128 : of.zero,
                  nullptr, {}, {}};
  columns.scale.assign(n, of.scale);
  columns.q = reinterpret_cast<std::int8_t*>(scratch.reserve(n * stride));
  for (std::int64_t i = 0; i < n; ++i, x += k) {
    std::int8_t* q = columns.q + i * stride;
    for (std::int64_t j = 0; j < k; ++j) q[j] = static_cast<std::int8_t>(x[j] ^ turn);
    std::memset(q + k, 0, stride - k);
  }
  const Sink sink{kernels, panel, columns, y, finish, {}};
  if (n * panel.rows * k < (few ? kSerial / 2 : kSerial)) threads = 1;
  if (few)
    few_columns(kernels, panel, columns, sink, threads);
  else
    many_columns(kernels, panel, columns, columns.q, stride, sink, threads);
}

}  // namespace subbyte
