#include "conv.hpp"

#include <algorithm>
#include <cstring>

#include "memory.hpp"
#include "threads.hpp"

namespace subbyte {
namespace {

// ---------------------------------------------------------------- weights

// Where a row's weights come from, in the order in which a pixel's window is read: rows of the
// window, each from left to right with all channels of a pixel together. Every run of neighbouring
// bytes is padded to whole groups of 4.
struct Window {
  std::vector<std::int32_t> order;       // k -> weight of the stored row, -1 for padding
  std::vector<std::int32_t> run_length;  // groups of 4 k
  std::vector<std::int64_t> run_y, run_x;

  explicit Window(const ConvShape& s) {
    const std::int64_t in = s.in_group();
    const bool whole_rows = s.dilation_w == 1;  // then neighbouring columns are neighbouring bytes
    for (std::int64_t ky = 0; ky < s.kernel_h; ++ky)
      for (std::int64_t kx = 0; kx < s.kernel_w; ++kx) {
        if (kx == 0 || !whole_rows) {
          run_y.push_back(ky * s.dilation_h);
          run_x.push_back(kx * s.dilation_w);
          run_length.push_back(0);
        }
        for (std::int64_t c = 0; c < in; ++c)
          order.push_back(static_cast<std::int32_t>((c * s.kernel_h + ky) * s.kernel_w + kx));
        if (kx + 1 < s.kernel_w && whole_rows) continue;
        while (order.size() % 4) order.push_back(-1);
        run_length.back() = static_cast<std::int32_t>(order.size() / 4);
      }
    for (std::size_t i = run_length.size(); i-- > 1;) run_length[i] -= run_length[i - 1];
  }
};

// ---------------------------------------------------------------- activations

// One plane of one image of 8-bit activations, padded: [groups][height][width][channels of a
// group].
struct Frame {
  std::int64_t channels, height, width;  // of one group
  std::int64_t row() const { return width * channels; }
  std::int64_t group_bytes() const { return height * row(); }
};

// Channels together: from [c][h * w] to rows of a frame.
void interleave(const std::int8_t* q, std::int64_t h, std::int64_t w, std::int64_t channels,
                std::int8_t* out, std::int64_t row) {
  for (std::int64_t y = 0; y < h; ++y)
    for (std::int64_t c0 = 0; c0 < channels; c0 += 16) {
      const std::int64_t c1 = std::min(channels, c0 + 16);
      for (std::int64_t x = 0; x < w; ++x)
        for (std::int64_t c = c0; c < c1; ++c)
          out[y * row + x * channels + c] = q[(c * h + y) * w + x];
    }
}

// The channels of one group: from [h * w][all channels] to rows of a frame.
void gather(const std::int8_t* q, std::int64_t h, std::int64_t w, std::int64_t all,
            std::int64_t channels, std::int8_t* out, std::int64_t row) {
  for (std::int64_t y = 0; y < h; ++y) {
    if (all == channels) {
      std::memcpy(out + y * row, q + y * w * all, w * all);
      continue;
    }
    for (std::int64_t x = 0; x < w; ++x)
      std::memcpy(out + y * row + x * channels, q + (y * w + x) * all, channels);
  }
}

struct Call {
  const Kernels& kernels;
  const ConvPanels& weight;
  std::int64_t n, h, w;
  bool x_last, y_last;
  int planes;
  Frame frame;
  std::int64_t groups;  // as frames and panels see them: 1 for depthwise
  std::uint8_t flip;

  std::int64_t plane_bytes() const { return groups * frame.group_bytes(); }
};

// All planes of one image. q: [planes][plane_bytes]; raw: scratch of h * w * channels * planes.
void fill_frame(const Call& call, const float* image, std::int8_t* raw, std::int8_t* q,
                Quantized* of) {
  const ConvShape& s = call.weight.shape();
  const std::int64_t values = s.channels * call.h * call.w;
  const Frame& frame = call.frame;
  quantize_column(call.kernels, image, values, values, call.flip, call.planes, raw, values, of);
  if (s.top | s.bottom | s.left | s.right)
    std::memset(q, call.flip, call.planes * call.plane_bytes());
  for (int plane = 0; plane < call.planes; ++plane, raw += values)
    for (std::int64_t g = 0; g < call.groups; ++g, q += frame.group_bytes()) {
      std::int8_t* inside = q + s.top * frame.row() + s.left * frame.channels;
      if (call.x_last)
        gather(raw + g * frame.channels, call.h, call.w, s.channels, frame.channels, inside,
               frame.row());
      else
        interleave(raw + g * frame.channels * call.h * call.w, call.h, call.w, frame.channels,
                   inside, frame.row());
    }
}

// ---------------------------------------------------------------- results

// Where the values of one image go.
struct Sink {
  float* y;  // of the image
  std::int64_t channels, pixels;
  bool last;  // channels last
  const float* bias;

  // sums: [n][32] of pixels `first` on and rows `row` on, exact; planes after the first are added.
  template <class T>
  void write(std::int64_t row, int rows, std::int64_t first, std::int64_t n, float scale,
             const float* row_scale, bool opens, T sum) const {
    for (int r = 0; r < rows; ++r) {
      const float factor = scale * row_scale[r];
      const float start = bias ? bias[row + r] : 0.0f;
      float* out = last ? y + first * channels + row + r : y + (row + r) * pixels + first;
      const std::int64_t step = last ? channels : 1;
      for (std::int64_t i = 0; i < n; ++i, out += step)
        *out = static_cast<float>(sum(i, r)) * factor + (opens ? start : *out);
    }
  }
};

// ---------------------------------------------------------------- products

constexpr std::int64_t kChunk = 64;  // pixels of a task

struct Decoded {
  std::int64_t block_bytes;
  const std::int8_t* data;
};

// Pixels [first, last) of one image and one block of rows, one plane.
void convolve_block(const Call& call, const Panel& panel, const std::int8_t* weights,
                    std::int64_t block, std::int64_t group, const Runs& runs, const std::uint8_t* q,
                    std::int64_t first, std::int64_t last, std::int64_t out_w,
                    const Quantized& quantized, bool opens, const Sink& sink) {
  const ConvShape& s = call.weight.shape();
  const int tile = call.kernels.tile;
  alignas(64) std::int32_t sums[kMaxTile * kBlockRows];
  const std::uint8_t* x[kMaxTile];
  const std::int64_t row = block * kBlockRows;
  const int rows = static_cast<int>(std::min<std::int64_t>(kBlockRows, panel.rows - row));
  const std::int32_t excess = call.flip ? 128 : 0;
  for (std::int64_t start = first; start < last; start += tile) {
    const std::int64_t n = std::min<std::int64_t>(tile, last - start);
    for (int i = 0; i < tile; ++i) {
      const std::int64_t pixel = start + (i < n ? i : 0);
      x[i] = q + pixel / out_w * s.stride_h * call.frame.row() +
             pixel % out_w * s.stride_w * call.frame.channels;
    }
    call.kernels.multiply(weights, panel.max_abs, runs, x, sums);
    sink.write(group * panel.rows + row, rows, start, n, quantized.scale, panel.scale.data() + row,
               opens, [&](std::int64_t i, int r) {
                 return sums[i * kBlockRows + r] - excess * panel.row_sum[row + r];
               });
  }
}

// The same for a depthwise convolution: 32 channels at a time, weights as [taps][32].
void convolve_depthwise(const Call& call, const Panel& panel, const std::int8_t* weights,
                        std::int64_t block, const std::int64_t* offset, std::int64_t taps,
                        const std::int8_t* q, std::int64_t first, std::int64_t last,
                        std::int64_t out_w, const Quantized& quantized, bool opens,
                        const Sink& sink) {
  const ConvShape& s = call.weight.shape();
  const std::int64_t row = block * kBlockRows;
  const int rows = static_cast<int>(std::min<std::int64_t>(kBlockRows, panel.rows - row));
  alignas(64) std::int32_t sums[kBlockRows];
  for (std::int64_t pixel = first; pixel < last; ++pixel) {
    const std::int8_t* x = q + pixel / out_w * s.stride_h * call.frame.row() +
                           pixel % out_w * s.stride_w * call.frame.channels + row;
    call.kernels.depthwise(weights, x, offset, taps, sums);
    sink.write(row, rows, pixel, 1, quantized.scale, panel.scale.data() + row, opens,
               [&](std::int64_t, int r) { return sums[r]; });
  }
}

// [k / 4][32][4] as [k][32].
void by_tap(const std::int8_t* weights, std::int64_t taps, std::int8_t* out) {
  for (std::int64_t k = 0; k < taps; ++k)
    for (int r = 0; r < kBlockRows; ++r)
      out[k * kBlockRows + r] = weights[k / 4 * kRunBytes + 4 * r + k % 4];
}

}  // namespace

ConvPanels::ConvPanels(const ConvShape& shape, const RadixCodes& codes, const float* scale,
                       Affine affine)
    : shape_(shape) {
  const std::int64_t length = shape.in_group() * shape.kernel_h * shape.kernel_w;
  if (shape.depthwise()) {
    std::vector<std::int32_t> order(length);
    for (std::int64_t i = 0; i < length; ++i) order[i] = static_cast<std::int32_t>(i);
    panels_.push_back(make_panel(codes, 0, shape.out_channels, length, order, scale, affine));
    return;
  }
  const Window window(shape);
  const std::int64_t rows = shape.out_channels / shape.groups;
  for (std::int64_t g = 0; g < shape.groups; ++g)
    panels_.push_back(
        make_panel(codes, g * rows, rows, length, window.order, scale + g * rows, affine));
}

std::size_t ConvPanels::bytes() const {
  std::size_t total = 0;
  for (const Panel& panel : panels_) total += panel.bytes();
  return total;
}

std::vector<std::int64_t> conv2d(const Kernels& kernels, const ConvPanels& weight, const float* x,
                                 std::int64_t n, std::int64_t h, std::int64_t w, bool x_last,
                                 float* y, bool y_last, const float* bias, Precision precision,
                                 int threads) {
  const ConvShape& s = weight.shape();
  const bool depthwise = s.depthwise();
  const std::int64_t groups = depthwise ? 1 : s.groups;
  const std::int64_t out_h = s.out_h(h), out_w = s.out_w(w), pixels = out_h * out_w;
  const Frame frame{s.channels / groups, h + s.top + s.bottom, w + s.left + s.right};
  const Call call{kernels,
                  weight,
                  n,
                  h,
                  w,
                  x_last,
                  y_last,
                  planes_of(precision),
                  frame,
                  groups,
                  static_cast<std::uint8_t>(depthwise ? 0 : kernels.flip)};
  const Panel& panel = weight.panels().front();  // all have one shape
  if (n * pixels * s.out_channels * panel.k * call.planes < kSerial) threads = 1;

  // Weights: every block once for all images.
  thread_local Buffer decoded_scratch, frames_scratch;
  const std::int64_t length = panel.groups() * panel.traits().group();
  const std::int64_t blocks = panel.blocks(), block_bytes = length * kBlockRows;
  auto* decoded =
      reinterpret_cast<std::int8_t*>(decoded_scratch.reserve(groups * blocks * block_bytes));
  parallel(threads, groups * blocks, [&](std::int64_t begin, std::int64_t end) {
    thread_local Buffer scratch;
    for (std::int64_t i = begin; i < end; ++i) {
      std::int8_t* out = decoded + i * block_bytes;
      if (!depthwise) {
        kernels.decode(weight.panels()[i / blocks], i % blocks, out);
        continue;
      }
      auto* grouped = reinterpret_cast<std::int8_t*>(scratch.reserve(block_bytes));
      kernels.decode(panel, i, grouped);
      by_tap(grouped, panel.k, out);
    }
  });

  // Activations.
  const std::int64_t image_bytes = call.planes * call.plane_bytes();
  auto* q = reinterpret_cast<std::int8_t*>(frames_scratch.reserve(n * image_bytes));
  std::vector<Quantized> of(n * call.planes);
  const std::int64_t values = s.channels * h * w;
  parallel(threads, n, [&](std::int64_t begin, std::int64_t end) {
    thread_local Buffer scratch;
    auto* raw = reinterpret_cast<std::int8_t*>(scratch.reserve(values * call.planes));
    for (std::int64_t i = begin; i < end; ++i)
      fill_frame(call, x + i * values, raw, q + i * image_bytes, &of[i * call.planes]);
  });

  // Products: an image's pixels in chunks, all blocks of a chunk one after another.
  Window window(s);
  std::vector<std::int64_t> offset;
  if (depthwise) {
    for (std::int64_t ky = 0; ky < s.kernel_h; ++ky)
      for (std::int64_t kx = 0; kx < s.kernel_w; ++kx)
        offset.push_back(ky * s.dilation_h * frame.row() + kx * s.dilation_w * frame.channels);
  } else {
    for (std::size_t i = 0; i < window.run_y.size(); ++i)
      offset.push_back(window.run_y[i] * frame.row() + window.run_x[i] * frame.channels);
  }
  const Runs runs{static_cast<int>(offset.size()), offset.data(), window.run_length.data()};
  const std::int64_t step = kChunk / kernels.tile * kernels.tile;
  const std::int64_t chunks = (pixels + step - 1) / step, per_chunk = groups * blocks;
  parallel(threads, n * chunks * per_chunk, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t block = task % per_chunk % blocks, group = task % per_chunk / blocks;
      const std::int64_t chunk = task / per_chunk % chunks, image = task / per_chunk / chunks;
      const std::int64_t first = chunk * step, last = std::min(pixels, first + step);
      const Sink sink{y + image * s.out_channels * pixels, s.out_channels, pixels, y_last, bias};
      const std::int8_t* weights = decoded + (group * blocks + block) * block_bytes;
      for (int plane = 0; plane < call.planes; ++plane) {
        const std::int8_t* frame_q =
            q + image * image_bytes + plane * call.plane_bytes() + group * frame.group_bytes();
        const Quantized& quantized = of[image * call.planes + plane];
        if (depthwise)
          convolve_depthwise(call, panel, weights, block, offset.data(), panel.k, frame_q, first,
                             last, out_w, quantized, plane == 0, sink);
        else
          convolve_block(call, weight.panels()[group], weights, block, group, runs,
                         reinterpret_cast<const std::uint8_t*>(frame_q), first, last, out_w,
                         quantized, plane == 0, sink);
      }
    }
  });

  std::vector<std::int64_t> odd;
  for (std::int64_t i = 0; i < n; ++i)
    if (!of[i * call.planes].fits) odd.push_back(i);
  return odd;
}

}  // namespace subbyte
