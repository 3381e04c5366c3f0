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

  std::int64_t count() const { return n * planes; }
  const std::int8_t* at(std::int64_t i) const { return q + i * stride; }
  float scale(std::int64_t i) const {
    return of[i / planes].of_plane(static_cast<int>(i % planes));
  }
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
               for (int plane = 0; plane < columns.planes; ++plane)
                 std::memset(q + plane * stride + k, columns.flip, stride - k);
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

  // One column's sums [32]. The planes of a row of x add up.
  void write(std::int64_t block, std::int64_t column, const std::int32_t* sums, int factor,
             const std::int32_t* excess) const {
    const std::int64_t row = block * kBlockRows,
                       rows = std::min<std::int64_t>(kBlockRows, panel.rows - row);
    const std::int64_t place = column / columns.planes * panel.rows + row;
    const int plane = static_cast<int>(column % columns.planes);
    const bool done = plane == columns.planes - 1, whole = rows == kBlockRows;
    float* out = y + place;
    alignas(64) float begin[kBlockRows], value[kBlockRows];
    const float* start = plane ? out : finish.bias ? finish.bias + row : nullptr;
    if (!start || !whole || finish.plus) {
      for (std::int64_t r = 0; r < kBlockRows; ++r) begin[r] = start && r < rows ? start[r] : 0.0f;
      for (std::int64_t r = 0; !plane && finish.plus && r < rows; ++r)
        begin[r] += finish.plus[place + r];
      start = begin;
    }
    const Scaling scaling{factor,
                          excess,
                          columns.scale(column),
                          panel.scale.data() + row,
                          start,
                          done ? finish.low : -Finish::kInfinity,
                          done ? finish.high : Finish::kInfinity};
    kernels.values(sums, scaling, whole ? out : value);
    if (!whole) std::memcpy(out, value, rows * sizeof(float));
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
        sink.write(b, c, sums + c * kBlockRows, panel.affine.factor, excess[c]);
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
        for (std::int64_t c = 0; c < n; ++c)
          sink.write(block, first + c, sums + c * kBlockRows, 1, panel.excess(kernels.flip, block));
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
  const bool few = n * planes <= kMaxSmall;
  const std::uint8_t flip = few ? 0 : kernels.flip;
  Columns columns{n, panel.k, stride, planes, flip, q, std::vector<Quantized>(n)};
  quantize_rows(kernels, x, threads, columns);
  if (columns.count() * panel.rows * panel.k < kSerial) threads = 1;
  const Sink sink{kernels, panel, columns, y, finish};
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
