#include "linear.hpp"

#include <algorithm>
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
  int planes;
  std::uint8_t flip;
  std::int8_t* q;
  std::vector<Quantized> of;  // [n]
  std::vector<float> scale;   // [count()]; 1 for columns in float32

  std::int64_t count() const { return n * planes; }
  const std::int8_t* at(std::int64_t i) const { return q + i * stride; }
};

void quantize_rows(const Kernels& kernels, const float* x, int threads, Columns& columns) {
  const std::int64_t k = columns.length, stride = columns.stride;
  parallel(columns.n * k < kSerial / 8 ? 1 : threads, columns.n,
           [&](std::int64_t begin, std::int64_t end) {
             for (std::int64_t i = begin; i < end; ++i) {
               std::int8_t* q = columns.q + i * columns.planes * stride;
               columns.of[i] = scale_of(kernels.peak(x + i * k, k));
               round_planes(kernels, x + i * k, k, columns.of[i], columns.flip, columns.planes, q,
                            stride);
               for (int plane = 0; plane < columns.planes; ++plane) {
                 std::memset(q + plane * stride + k, columns.flip, stride - k);
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

  // The sums [n][32] of columns from `first` on. The planes of a row of x add up.
  template <class Sum>
  void write(std::int64_t block, std::int64_t first, std::int64_t n, const Sum* sums, int factor,
             const std::int32_t* excess) const {
    const std::int64_t row = block * kBlockRows;
    const std::int64_t rows = std::min<std::int64_t>(kBlockRows, panel.rows - row);
    const bool whole = rows == kBlockRows;
    alignas(64) float bias[kBlockRows] = {}, value[kBlockRows];
    if (finish.bias) std::memcpy(bias, finish.bias + row, rows * sizeof(float));
    Scaling scaling{factor, excess,  nullptr,    1,          panel.scale.data() + row,
                    bias,   nullptr, panel.rows, finish.low, finish.high};
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
  std::int32_t excess[kMaxSmall][kBlockRows];
  const std::int8_t* x[kMaxSmall];
  for (int c = 0; c < n; ++c) {
    x[c] = columns.at(c);
    std::fill_n(excess[c], kBlockRows, panel.affine.center * kernels.sum(x[c], columns.length));
  }
  parallel(threads, panel.blocks(), [&](std::int64_t begin, std::int64_t end) {
    alignas(64) std::int32_t sums[kMaxSmall * kBlockRows];
    for (std::int64_t b = begin; b < end; ++b) {
      kernels.small(panel, b, x, n, sums);
      for (int c = 0; c < n; ++c)
        sink.write(b, c, 1, sums + c * kBlockRows, panel.affine.factor, excess[c]);
    }
  });
}

// x: columns of T, `stride` apart.
template <class T>
void many_columns(const Kernels& kernels, const Panel& panel, const Columns& columns, const T* x,
                  std::int64_t stride, const Sink& sink, int threads) {
  const std::int64_t offset = 0, length = panel.groups() * panel.traits().group();
  // In groups of 4 bytes: 4 activations, or a float.
  const std::int32_t groups = static_cast<std::int32_t>(sizeof(T) == 1 ? length / 4 : panel.k);
  const Runs runs{1, &offset, &groups};
  // A block's weights are decoded once for all columns, unless there are fewer blocks than threads.
  const std::int64_t tiles = (columns.count() + kernels.tile - 1) / kernels.tile;
  const std::int64_t parts = panel.blocks() >= threads ? 1 : std::min<std::int64_t>(threads, tiles);
  parallel(threads, panel.blocks() * parts, [&](std::int64_t begin, std::int64_t end) {
    thread_local Buffer scratch, wide;
    auto* decoded = reinterpret_cast<std::int8_t*>(scratch.reserve(length * kBlockRows));
    alignas(64) SumOf<T> sums[kMaxTile * kBlockRows] = {};
    const std::uint8_t* column[kMaxTile];
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t block = task / parts, part = task % parts;
      kernels.decode(panel, block, decoded);
      const T* weights = weights_as<T>(kernels, panel, decoded, wide);
      for (std::int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
        const std::int64_t first = tile * kernels.tile;
        const std::int64_t n = std::min<std::int64_t>(kernels.tile, columns.count() - first);
        for (int c = 0; c < kernels.tile; ++c)
          column[c] = reinterpret_cast<const std::uint8_t*>(x + (first + (c < n ? c : 0)) * stride);
        multiply(kernels, panel, weights, panel.rows - block * kBlockRows, runs, n, column, sums);
        sink.write(block, first, n, sums, 1, panel.excess(kernels.flip, block));
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
  Columns columns{n, panel.k, stride, planes, kernels.flip, nullptr, {}, {}};
  columns.scale.assign(n * planes, 1.0f);
  const Sink sink{kernels, panel, columns, y, finish};
  const std::int64_t cost = columns.count() * panel.rows * panel.k * (single ? 4 : 1);
  const int team = cost < kSerial ? 1 : threads;
  if (single) {
    many_columns(kernels, panel, columns, x, panel.k, sink, team);
    std::vector<std::int64_t> odd;
    for (std::int64_t i = 0; i < n; ++i)
      if (may_overflow(kernels.peak(x + i * panel.k, panel.k), panel.k, panel.max_abs))
        odd.push_back(i);
    return odd;
  }
  const bool few = columns.count() <= kMaxSmall;
  if (few) columns.flip = 0;
  columns.q = reinterpret_cast<std::int8_t*>(scratch.reserve(n * planes * stride));
  columns.of.resize(n);
  quantize_rows(kernels, x, team, columns);
  if (few)
    few_columns(kernels, panel, columns, sink, team);
  else
    many_columns(kernels, panel, columns, columns.q, stride, sink, team);
  std::vector<std::int64_t> odd;
  for (std::int64_t i = 0; i < n; ++i)
    if (!columns.of[i].fits || !panel.scales(columns.of[i].scale)) odd.push_back(i);
  return odd;
}

}  // namespace subbyte
