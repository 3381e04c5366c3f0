#include "linear.hpp"

#include <algorithm>
#include <vector>

#include "memory.hpp"
#include "threads.hpp"

namespace subbyte {
namespace {

// The activations of one call, `planes` columns to a row of x.
struct Columns {
  std::int64_t n, length, stride;
  int planes;
  std::int8_t* q;
  std::vector<Quantized> of;

  std::int64_t count() const { return n * planes; }
  const std::int8_t* at(std::int64_t i) const { return q + i * stride; }
};

void quantize_rows(const Kernels& kernels, const float* x, std::uint8_t flip, int threads,
                   Columns& columns) {
  const std::int64_t k = columns.length;
  parallel(columns.n * k < kSerial / 8 ? 1 : threads, columns.n,
           [&](std::int64_t begin, std::int64_t end) {
             for (std::int64_t i = begin; i < end; ++i) {
               const std::int64_t c = i * columns.planes;
               quantize_column(kernels, x + i * k, k, columns.stride, flip, columns.planes,
                               columns.q + c * columns.stride, columns.stride, &columns.of[c]);
             }
           });
}

// One block's integer sums of a range of columns, added to y as values.
struct Sink {
  const Panel& panel;
  const Columns& columns;
  float* y;
  const float* bias;

  // t(c, r): the exact integer sum of column c (counted from `first`) and row r of the block.
  template <class T>
  void write(std::int64_t block, std::int64_t first, std::int64_t n, T t) const {
    const std::int64_t row = block * kBlockRows;
    const int rows = static_cast<int>(std::min<std::int64_t>(kBlockRows, panel.rows - row));
    for (std::int64_t c = 0; c < n; ++c) {
      const Quantized& column = columns.of[first + c];
      float* out = y + (first + c) / columns.planes * panel.rows + row;
      const bool opens = (first + c) % columns.planes == 0;
      const float* start = opens ? (bias ? bias + row : nullptr) : out;
      const float* scale = panel.scale.data() + row;
      for (int r = 0; r < rows; ++r)
        out[r] = static_cast<float>(t(c, r)) * (column.scale * scale[r]) + (start ? start[r] : 0.0f);
    }
  }
};

void few_columns(const Kernels& kernels, const Panel& panel, const Columns& columns,
                 const Sink& sink, int threads) {
  const Affine affine = panel.affine;
  parallel(threads, panel.blocks(), [&](std::int64_t begin, std::int64_t end) {
    alignas(64) std::int32_t sums[kMaxSmall * kBlockRows];
    const std::int8_t* x[kMaxSmall];
    for (std::int64_t c = 0; c < columns.count(); ++c) x[c] = columns.at(c);
    for (std::int64_t b = begin; b < end; ++b) {
      kernels.small(panel, b, x, static_cast<int>(columns.count()), sums);
      sink.write(b, 0, columns.count(), [&](std::int64_t c, int r) {
        return affine.factor * sums[c * kBlockRows + r] - affine.center * columns.of[c].sum;
      });
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
    alignas(64) std::int32_t sums[kMaxTile * kBlockRows];
    const std::uint8_t* x[kMaxTile];
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t block = task / parts, part = task % parts;
      kernels.decode(panel, block, weights);
      for (std::int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
        const std::int64_t first = tile * kernels.tile;
        const std::int64_t n = std::min<std::int64_t>(kernels.tile, columns.count() - first);
        for (int c = 0; c < kernels.tile; ++c)
          x[c] = reinterpret_cast<const std::uint8_t*>(columns.at(first + (c < n ? c : 0)));
        kernels.multiply(weights, panel.max_abs, runs, x, sums);
        const std::int32_t* row_sum = panel.row_sum.data() + block * kBlockRows;
        const std::int32_t excess = kernels.flip ? 128 : 0;
        sink.write(block, first, n, [&](std::int64_t c, int r) {
          return sums[c * kBlockRows + r] - excess * row_sum[r];
        });
      }
    }
  });
}

}  // namespace

std::vector<std::int64_t> linear(const Kernels& kernels, const Panel& panel, const float* x,
                                 std::int64_t n, float* y, const float* bias, Precision precision,
                                 int threads) {
  thread_local Buffer scratch;
  const int planes = planes_of(precision);
  const std::int64_t stride = panel.groups() * panel.traits().group();
  auto* q = reinterpret_cast<std::int8_t*>(scratch.reserve(n * planes * stride));
  Columns columns{n, panel.k, stride, planes, q, std::vector<Quantized>(n * planes)};
  const bool few = columns.count() <= kMaxSmall;
  quantize_rows(kernels, x, few ? 0 : kernels.flip, threads, columns);
  if (columns.count() * panel.rows * panel.k < kSerial) threads = 1;
  const Sink sink{panel, columns, y, bias};
  if (few)
    few_columns(kernels, panel, columns, sink, threads);
  else
    many_columns(kernels, panel, columns, sink, threads);
  std::vector<std::int64_t> odd;
  for (std::int64_t i = 0; i < n; ++i)
    if (!columns.of[i * planes].fits) odd.push_back(i);
  return odd;
}

}  // namespace subbyte
