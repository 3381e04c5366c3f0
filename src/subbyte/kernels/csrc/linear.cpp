#include "linear.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

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
      values(sums, n, scaling, y + place, panel.rows);
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
      values(sums, 1, scaling, value, kBlockRows);
      std::memcpy(y + place, value, rows * sizeof(float));
    }
  }

  void values(const std::int32_t* sums, std::int64_t n, const Scaling& scaling, float* out,
              std::int64_t step) const {
    kernels.values(sums, n, scaling, out, step);
  }
  void values(const float* sums, std::int64_t n, const Scaling& scaling, float* out,
              std::int64_t step) const {
    kernels.values_float(sums, n, scaling, out, step);
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

void many_columns(const Kernels& kernels, const Panel& panel, const Columns& columns,
                  const Sink& sink, int threads) {
  const std::int64_t offset = 0;
  const std::int32_t length = static_cast<std::int32_t>(panel.groups() * panel.traits().positions);
  const Runs runs{1, &offset, &length};
  // A block's weights are decoded once for all columns, unless there are fewer blocks than threads.
  const std::int64_t tiles = (columns.count() + kernels.tile - 1) / kernels.tile;
  const std::int64_t parts = panel.blocks() >= threads ? 1 : std::min<std::int64_t>(threads, tiles);
  parallel(threads, panel.blocks() * parts, [&](std::int64_t begin, std::int64_t end) {
    thread_local Buffer scratch;
    auto* weights = reinterpret_cast<std::int8_t*>(scratch.reserve(length * kRunBytes));
    alignas(64) std::int32_t sums[kMaxTile * kBlockRows] = {};
    const std::uint8_t* x[kMaxTile];
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t block = task / parts, part = task % parts;
      kernels.decode(panel, block, weights);
      for (std::int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
        const std::int64_t first = tile * kernels.tile;
        const std::int64_t n = std::min<std::int64_t>(kernels.tile, columns.count() - first);
        for (int c = 0; c < kernels.tile; ++c)
          x[c] = reinterpret_cast<const std::uint8_t*>(columns.at(first + (c < n ? c : 0)));
        kernels.multiply(weights, panel.max_abs, panel.rows - block * kBlockRows, runs, x, sums);
        sink.write(block, first, n, sums, 1, panel.excess(kernels.flip, block));
      }
    }
  });
}

// Columns as they are: the rows of x.
void float_columns(const Kernels& kernels, const Panel& panel, const Columns& columns,
                   const float* x, const Sink& sink, int threads) {
  const std::int64_t offset = 0, length = panel.groups() * panel.traits().group();
  const std::int32_t k = static_cast<std::int32_t>(panel.k);
  const Runs runs{1, &offset, &k};
  const std::int64_t tiles = (columns.n + kernels.tile - 1) / kernels.tile;
  const std::int64_t parts = panel.blocks() >= threads ? 1 : std::min<std::int64_t>(threads, tiles);
  parallel(threads, panel.blocks() * parts, [&](std::int64_t begin, std::int64_t end) {
    thread_local Buffer bytes, floats;
    auto* decoded = reinterpret_cast<std::int8_t*>(bytes.reserve(length * kBlockRows));
    auto* weights = reinterpret_cast<float*>(floats.reserve(length * kBlockRows * sizeof(float)));
    alignas(64) float sums[kMaxTile * kBlockRows] = {};
    const std::uint8_t* column[kMaxTile];
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t block = task / parts, part = task % parts;
      kernels.decode(panel, block, decoded);
      kernels.widen(panel, decoded, weights);
      for (std::int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
        const std::int64_t first = tile * kernels.tile;
        const std::int64_t n = std::min<std::int64_t>(kernels.tile, columns.n - first);
        for (int c = 0; c < kernels.tile; ++c)
          column[c] =
              reinterpret_cast<const std::uint8_t*>(x + (first + (c < n ? c : 0)) * panel.k);
        kernels.multiply_float(weights, panel.rows - block * kBlockRows, runs, n, column, sums);
        sink.write(block, first, n, sums, 1, panel.excess(0, block));
      }
    }
  });
}

}  // namespace

std::vector<std::int64_t> linear(const Kernels& kernels, const Panel& panel, const float* x,
                                 std::int64_t n, float* y, const Finish& finish,
                                 Precision precision, int threads) {
  thread_local Buffer scratch;
  const int planes = planes_of(precision);
  const std::int64_t stride = panel.groups() * panel.traits().group();
  auto* q = reinterpret_cast<std::int8_t*>(scratch.reserve(n * planes * stride));
  const bool single = precision == Precision::kFloat32, few = n * planes <= kMaxSmall;
  const std::uint8_t flip = few ? 0 : kernels.flip;
  Columns columns{n,
                  panel.k,
                  stride,
                  planes,
                  flip,
                  q,
                  std::vector<Quantized>(n),
                  std::vector<float>(n * planes)};
  const Sink sink{kernels, panel, columns, y, finish};
  if (columns.count() * panel.rows * panel.k * (single ? 4 : 1) < kSerial) threads = 1;
  if (single) {
    columns.scale.assign(n, 1.0f);
    float_columns(kernels, panel, columns, x, sink, threads);
    return {};
  }
  quantize_rows(kernels, x, threads, columns);
  if (few)
    few_columns(kernels, panel, columns, sink, threads);
  else
    many_columns(kernels, panel, columns, sink, threads);
  std::vector<std::int64_t> odd;
  for (std::int64_t i = 0; i < n; ++i)
    if (!columns.of[i].fits) odd.push_back(i);
  return odd;
}

}  // namespace subbyte
