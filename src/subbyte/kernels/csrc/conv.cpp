#include "conv.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "arithmetic.hpp"
#include "depthwise.hpp"
#include "memory.hpp"
#include "radix.hpp"
#include "sizes.hpp"
#include "threads.hpp"

namespace subbyte {
namespace {

// ---------------------------------------------------------------- weights

// Where a row's weights come from, in the order in which a pixel's window is read: rows of the
// window, each from left to right with all channels of a pixel together. Every run of neighbouring
// bytes is padded to whole groups of 4. order: k -> weight of the stored row, -1 for padding.
WindowRuns runs_of(const ConvShape& s, std::vector<std::int32_t>& order) {
  WindowRuns runs;
  const std::int64_t in = s.in_group();
  const bool whole_rows = s.dilation_w == 1;  // then neighbouring columns are neighbouring bytes
  for (std::int64_t ky = 0; ky < s.kernel_h; ++ky)
    for (std::int64_t kx = 0; kx < s.kernel_w; ++kx) {
      if (kx == 0 || !whole_rows) {
        runs.y.push_back(ky * s.dilation_h);
        runs.x.push_back(kx * s.dilation_w);
        runs.length.push_back(0);
        runs.values.push_back(0);
      }
      for (std::int64_t c = 0; c < in; ++c)
        order.push_back(static_cast<std::int32_t>((c * s.kernel_h + ky) * s.kernel_w + kx));
      runs.values.back() += static_cast<std::int32_t>(in);
      if (kx + 1 < s.kernel_w && whole_rows) continue;
      while (order.size() % 4) order.push_back(-1);
      runs.length.back() = static_cast<std::int32_t>(order.size() / 4);
    }
  for (std::size_t i = runs.length.size(); i-- > 1;) runs.length[i] -= runs.length[i - 1];
  return runs;
}

// ---------------------------------------------------------------- activations

// One plane of one image of rounded activations, or an image of float ones, padded:
// [groups][height][width][channels of a group].
struct Frame {
  std::int64_t groups, channels, height, width;  // channels of one group
  std::int64_t row() const { return width * channels; }
  std::int64_t group_values() const { return height * row(); }
  std::int64_t values() const { return groups * group_values(); }
};

struct Call {
  const Kernels& kernels;
  const ConvPanels& weight;
  const Images& x;
  std::int64_t n, h, w;
  const Target& y;
  int planes, threads;
  Frame frame;

  // What a byte of a frame is more than its value, to the dot product: 0, 128 or -128.
  int offset() const {
    const int zero = x.bytes ? x.scale.zero : 128;
    return kernels.flip ? zero : zero - 128;
  }
  // What bytes in memory are xored with, so that they are the dot product's.
  std::uint8_t turn() const { return kernels.flip ^ 0x80; }
  // The byte of a frame that means 0.
  std::uint8_t nothing() const {
    return x.bytes ? static_cast<std::uint8_t>(x.scale.zero ^ turn()) : kernels.flip;
  }

  const ConvShape& shape() const { return weight.shape(); }
  std::int64_t values() const { return shape().channels * h * w; }  // of an image
  std::int64_t frames() const { return planes * frame.values(); }   // of an image
};

// The bits of the largest magnitude of each image.
std::vector<std::int32_t> peaks_of(const Call& call) {
  const float* x = call.x.floats;
  const std::int64_t parts = (call.threads + call.n - 1) / call.n;
  std::vector<std::int32_t> peaks(call.n * parts), of(call.n);
  parallel(call.threads, call.n * parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t part = i % parts, first = call.values() * part / parts;
      const std::int64_t count = call.values() * (part + 1) / parts - first;
      peaks[i] = call.kernels.peak(x + i / parts * call.values() + first, count);
    }
  });
  for (std::int64_t i = 0; i < call.n; ++i)
    of[i] = *std::max_element(&peaks[i * parts], &peaks[i * parts] + parts);
  return of;
}

// Channels together: from [channels][stride] to [n][channels].
void interleave(const std::int8_t* q, std::int64_t stride, std::int64_t n, std::int64_t channels,
                std::int8_t* out) {
  constexpr std::int64_t kTile = 16;
  for (std::int64_t c0 = 0; c0 < channels; c0 += kTile) {
    const std::int64_t c1 = std::min(channels, c0 + kTile);
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t c = c0; c < c1; ++c) out[i * channels + c] = q[c * stride + i];
  }
}

// The border beside rows [first, last) of one image in its frame, all planes.
void fill_sides(const Call& call, std::int64_t first, std::int64_t last, std::int8_t* q) {
  const ConvShape& s = call.shape();
  const Frame& frame = call.frame;
  const std::int64_t before = s.left * frame.channels, after = s.right * frame.channels;
  for (std::int64_t i = 0; i < call.planes * frame.groups; ++i)
    for (std::int64_t y = s.top + first; y < s.top + last; ++y) {
      std::int8_t* row = q + i * frame.group_values() + y * frame.row();
      std::memset(row, call.nothing(), before);
      std::memset(row + frame.row() - after, call.nothing(), after);
    }
}

// Rows [first, last) of one image of bytes into its frame, whose first value is at q.
void copy_rows(const Call& call, const std::uint8_t* image, std::int64_t first, std::int64_t last,
               std::int8_t* q) {
  const ConvShape& s = call.shape();
  const Frame& frame = call.frame;
  const std::uint8_t turn = call.turn();
  const auto copy = [&](const std::uint8_t* from, std::int64_t n, std::int8_t* to) {
    if (!turn)
      std::memcpy(to, from, n);
    else
      for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<std::int8_t>(from[i] ^ turn);
  };
  for (std::int64_t g = 0; g < frame.groups; ++g, q += frame.group_values())
    for (std::int64_t y = first; y < last; ++y) {
      const std::uint8_t* row = image + y * call.w * s.channels;
      if (frame.groups == 1)
        copy(row, call.w * s.channels, q + y * frame.row());
      else
        for (std::int64_t x = 0; x < call.w; ++x)
          copy(row + x * s.channels + g * frame.channels, frame.channels,
               q + y * frame.row() + x * frame.channels);
    }
}

// Rows [first, last) of one image of floats into its frame, whose first value is at q; all planes.
void round_rows(const Call& call, const float* image, const Quantized& of, std::int64_t first,
                std::int64_t last, std::int8_t* q) {
  thread_local Buffer scratch;
  const ConvShape& s = call.shape();
  const Frame& frame = call.frame;
  const std::uint8_t flip = call.kernels.flip;
  const std::int64_t w = call.w, rows = last - first, count = s.channels * rows * w;
  if (call.x.last && frame.groups == 1) {
    for (std::int64_t y = first; y < last; ++y)
      round_planes(call.kernels, image + y * w * s.channels, w * s.channels, of, flip, call.planes,
                   q + y * frame.row(), frame.values());
    return;
  }
  auto* raw = reinterpret_cast<std::int8_t*>(scratch.reserve(call.planes * count));
  if (call.x.last) {
    round_planes(call.kernels, image + first * w * s.channels, count, of, flip, call.planes, raw,
                 count);
  } else {
    for (std::int64_t c = 0; c < s.channels; ++c)
      round_planes(call.kernels, image + (c * call.h + first) * w, rows * w, of, flip, call.planes,
                   raw + c * rows * w, count);
  }
  for (int plane = 0; plane < call.planes; ++plane, raw += count)
    for (std::int64_t g = 0; g < frame.groups; ++g, q += frame.group_values())
      for (std::int64_t y = first; y < last; ++y) {
        std::int8_t* out = q + y * frame.row();
        if (!call.x.last)
          interleave(raw + (g * frame.channels * rows + y - first) * w, rows * w, w, frame.channels,
                     out);
        else
          for (std::int64_t x = 0; x < w; ++x)
            std::memcpy(out + x * frame.channels,
                        raw + ((y - first) * w + x) * s.channels + g * frame.channels,
                        frame.channels);
      }
}

// All images as frames [n][planes].
void fill_frames(const Call& call, const std::vector<Quantized>& of, std::int8_t* q) {
  const ConvShape& s = call.shape();
  const std::int64_t parts = std::min(call.h, (2 * call.threads + call.n - 1) / call.n);
  parallel(call.threads, call.n * parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t image = i / parts, part = i % parts;
      const std::int64_t first = call.h * part / parts, last = call.h * (part + 1) / parts;
      std::int8_t* frame = q + image * call.frames();
      fill_sides(call, first, last, frame);
      frame += s.top * call.frame.row() + s.left * call.frame.channels;
      if (call.x.bytes)
        copy_rows(call, call.x.bytes + image * call.values(), first, last, frame);
      else
        round_rows(call, call.x.floats + image * call.values(), of[image], first, last, frame);
    }
  });
  const std::int64_t above = s.top * call.frame.row(), below = s.bottom * call.frame.row();
  for (std::int64_t i = 0; i < call.n * call.planes * call.frame.groups; ++i) {
    std::int8_t* frame = q + i * call.frame.group_values();
    std::memset(frame, call.nothing(), above);
    std::memset(frame + call.frame.group_values() - below, call.nothing(), below);
  }
}

// The same for activations that stay as they are.
void fill_floats(const Call& call, float* frames) {
  const ConvShape& s = call.shape();
  const Frame& frame = call.frame;
  std::memset(frames, 0, call.n * frame.values() * sizeof(float));
  parallel(call.threads, call.n * call.h, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t y = i % call.h;
      const float* image = call.x.floats + i / call.h * call.values();
      for (std::int64_t g = 0; g < frame.groups; ++g) {
        float* out = frames + i / call.h * frame.values() + g * frame.group_values() +
                     (s.top + y) * frame.row() + s.left * frame.channels;
        const std::int64_t first = g * frame.channels;
        for (std::int64_t p = 0; call.x.last && p < call.w; ++p)
          std::memcpy(out + p * frame.channels, image + (y * call.w + p) * s.channels + first,
                      frame.channels * sizeof(float));
        for (std::int64_t c = 0; !call.x.last && c < frame.channels; ++c)
          for (std::int64_t p = 0; p < call.w; ++p)
            out[p * frame.channels + c] = image[((first + c) * call.h + y) * call.w + p];
      }
    }
  });
}

// ---------------------------------------------------------------- products

constexpr std::int64_t kChunk = 64;  // pixels of a task

// A task: pixels [first, first + n) of one image, for one block of rows of one group.
template <class T>  // of weights and activations: std::int8_t or float
struct Task {
  std::int64_t row, rows;  // row: the first output channel, of all groups
  const Panel& panel;
  const T* weights;  // decoded
  std::int64_t first, n, out_w;
};

// f(pixel, n, x [tile]) for all pixels of a task, a tile of n at a time, counted from task.first.
// frame: of the task's group.
template <class T, class F>
void for_tiles(const Call& call, const Task<T>& task, const T* frame, F&& f) {
  const ConvShape& s = call.shape();
  const std::uint8_t* x[kMaxTile];
  const std::int64_t down = s.stride_h * call.frame.row(), right = s.stride_w * call.frame.channels;
  std::int64_t column = task.first % task.out_w;
  const T* start = frame + task.first / task.out_w * down;  // of a row of pixels
  const T* pixel = start + column * right;
  for (std::int64_t first = 0; first < task.n; first += call.kernels.tile) {
    const std::int64_t n = std::min<std::int64_t>(call.kernels.tile, task.n - first);
    for (std::int64_t i = 0; i < n; ++i, pixel += right) {
      x[i] = reinterpret_cast<const std::uint8_t*>(pixel);
      if (++column == task.out_w) column = 0, pixel = (start += down) - right;
    }
    for (std::int64_t i = n; i < call.kernels.tile; ++i) x[i] = x[0];
    f(first, n, x);
  }
}

// finish(pixel, n, sums [n][32]) for the same tiles.
template <class T, class F>
void multiply_pixels(const Call& call, const Task<T>& task, const Runs& runs, const T* frame,
                     F&& finish) {
  alignas(64) SumOf<T> sums[kMaxTile * kBlockRows] = {};
  for_tiles(call, task, frame,
            [&](std::int64_t first, std::int64_t n, const std::uint8_t* const* x) {
              multiply(call.kernels, task.panel, task.weights, task.rows, runs, n, x, sums);
              finish(first, n, sums);
            });
}

// As memcpy, for as few values as channels are: it would be a call a pixel.
inline void copy_few(const float* from, std::int64_t n, float* to) {
  constexpr std::int64_t kStep = 4;
  std::int64_t i = 0;
  for (; i + kStep <= n; i += kStep) std::memcpy(to + i, from + i, kStep * sizeof(float));
  for (; i < n; ++i) to[i] = from[i];
}

// Where an image's values go.
struct Sink {
  float* y;
  std::int64_t channels, pixels;
  bool last;  // channels last

  // Whether a pixel's values lie together in whole vectors, at `place`: else they go to a buffer
  // first, and by `write` from there.
  template <class T>
  bool whole(const Task<T>& task) const {
    return last && task.rows == whole_rows(task.rows);
  }
  template <class T>
  std::int64_t place(const Task<T>& task) const {
    return task.first * channels + task.row;
  }

  template <class T>
  void write(const Task<T>& task, const float (*value)[kBlockRows]) const {
    if (last) {
      for (std::int64_t i = 0; i < task.n; ++i)
        copy_few(value[i], task.rows, y + (task.first + i) * channels + task.row);
      return;
    }
    for (std::int64_t r = 0; r < task.rows; ++r) {
      float* out = y + (task.row + r) * pixels + task.first;
      for (std::int64_t i = 0; i < task.n; ++i) out[i] = value[i][r];
    }
  }

  // The other way round, from an image `plus` that lies as y does.
  template <class T>
  void read(const Task<T>& task, const float* plus, float (*value)[kBlockRows]) const {
    if (last) {
      for (std::int64_t i = 0; i < task.n; ++i)
        copy_few(plus + (task.first + i) * channels + task.row, task.rows, value[i]);
      return;
    }
    for (std::int64_t i = 0; i < task.n; ++i)
      for (std::int64_t r = 0; r < task.rows; ++r)
        value[i][r] = plus[(task.row + r) * pixels + task.first + i];
  }
};

// A task's values as bytes. frame: of the task's group; scale: of the image; to: of the image.
void multiply_to_bytes(const Call& call, const Task<std::int8_t>& task, const Runs& runs,
                       const std::int8_t* frame, float scale, const std::int32_t* excess, Target to,
                       const Finish& finish) {
  const std::int64_t channels = call.shape().out_channels, rows = whole_rows(task.rows);
  alignas(64) float row_scale[kBlockRows], bias[kBlockRows] = {};
  alignas(64) std::uint8_t value[kChunk][kBlockRows];
  const float inverse = 1.0f / to.scale.scale;
  const float* own = task.panel.scale.data() + task.row % task.panel.rows;
  for (int r = 0; r < kBlockRows; ++r) row_scale[r] = scale * own[r] * inverse;
  for (int r = 0; finish.bias && r < task.rows; ++r) bias[r] = finish.bias[task.row + r] * inverse;
  const std::int64_t place = task.first * channels + task.row;
  const bool whole = rows == task.rows;
  std::uint8_t* out = whole ? to.bytes + place : value[0];
  const std::int64_t step = whole ? channels : kBlockRows;
  if (to.plus) to.plus += place;
  Rounding rounding = rounding_of(to, finish, row_scale, bias);
  rounding.plus_step = channels;
  for_tiles(call, task, frame,
            [&](std::int64_t first, std::int64_t n, const std::uint8_t* const* x) {
              if (to.plus) rounding.plus = to.plus + first * channels;
              call.kernels.multiply_bytes(task.weights, task.panel.max_abs, rows, runs, x, n,
                                          excess, rounding, out + first * step, step);
            });
  if (whole) return;
  for (std::int64_t i = 0; i < task.n; ++i)
    std::memcpy(to.bytes + place + i * channels, value[i], task.rows);
}

// The product of frames of T with the weights. of: the scales of the images, none for float.
template <class T>
class Product {
 public:
  Product(const Call& call, const T* frames, const std::vector<Quantized>& of, const Finish& finish)
      : call_(call), frames_(frames), of_(of), finish_(finish) {
    const WindowRuns& window = call.weight.runs();
    for (std::size_t i = 0; i < window.y.size(); ++i)
      offset_.push_back((window.y[i] * call.frame.row() + window.x[i] * call.frame.channels) *
                        static_cast<std::int64_t>(sizeof(T)));
    runs_ = {static_cast<int>(offset_.size()), offset_.data(),
             (kSingle ? window.values : window.length).data()};
    const ConvShape& s = call.shape();
    out_w_ = s.out_w(call.w);
    pixels_ = s.out_h(call.h) * out_w_;
    step_ = kChunk / call.kernels.tile * call.kernels.tile;
    chunks_ = (pixels_ + step_ - 1) / step_;
    const Panel& first = call.weight.panels().front();  // all have one shape
    blocks_ = first.blocks();
    length_ = first.groups() * first.traits().group();
  }

  // Weights that stay in a core's cache are decoded once, and read for a chunk of pixels after
  // another; of others a block stays, and all pixels are read for it.
  void run(Buffer& decoded) const {
    constexpr std::int64_t kCached = std::int64_t{1} << 18;
    if (all() * block_bytes() <= kCached)
      by_chunks(decoded);
    else
      by_blocks();
  }

 private:
  static constexpr bool kSingle = std::is_same_v<T, float>;

  std::int64_t all() const { return blocks_ * call_.shape().groups; }
  std::int64_t block_bytes() const { return length_ * kBlockRows; }
  const Panel& panel(std::int64_t block) const { return call_.weight.panels()[block / blocks_]; }

  void by_chunks(Buffer& scratch) const {
    auto* decoded = reinterpret_cast<std::int8_t*>(scratch.reserve(all() * block_bytes()));
    parallel(call_.threads, all(), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        call_.kernels.decode(panel(i), i % blocks_, decoded + i * block_bytes());
    });
    parallel(call_.threads, call_.n * chunks_ * all(), [&](std::int64_t begin, std::int64_t end) {
      thread_local Buffer wide;
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t block = i % all();
        take(block,
             weights_as<T>(call_.kernels, panel(block), block % blocks_,
                           decoded + block * block_bytes(), wide),
             i / all() / chunks_, i / all() % chunks_);
      }
    });
  }

  void by_blocks() const {
    const std::int64_t tasks = call_.n * chunks_;
    const std::int64_t parts =
        all() >= 2 * call_.threads ? 1 : std::min<std::int64_t>(call_.threads, tasks);
    parallel(call_.threads, all() * parts, [&](std::int64_t begin, std::int64_t end) {
      thread_local Buffer scratch, wide;
      auto* decoded = reinterpret_cast<std::int8_t*>(scratch.reserve(block_bytes()));
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t block = i / parts, part = i % parts;
        call_.kernels.decode(panel(block), block % blocks_, decoded);
        const T* weights =
            weights_as<T>(call_.kernels, panel(block), block % blocks_, decoded, wide);
        for (std::int64_t t = tasks * part / parts; t < tasks * (part + 1) / parts; ++t)
          take(block, weights, t / chunks_, t % chunks_);
      }
    });
  }

  // The values of a block of rows of all groups, at a chunk of an image's pixels.
  void take(std::int64_t block, const T* weights, std::int64_t image, std::int64_t chunk) const {
    const Panel& own = panel(block);
    const std::int64_t group = block / blocks_, row = block % blocks_ * kBlockRows;
    const std::int64_t rows = std::min<std::int64_t>(kBlockRows, own.rows - row);
    const Task<T> task{group * own.rows + row,
                       rows,
                       own,
                       weights,
                       chunk * step_,
                       std::min(step_, pixels_ - chunk * step_),
                       out_w_};
    alignas(64) std::int32_t excess[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r)
      excess[r] = call_.offset() / 128 * own.excess_of_flip[row + r];
    if constexpr (!kSingle)
      if (call_.y.bytes) {
        Target to = call_.y;
        to.bytes += image * call_.shape().out_channels * pixels_;
        if (to.plus) to.plus += image * call_.shape().out_channels * pixels_;
        return multiply_to_bytes(call_, task, runs_, frame(image, 0, group), of_[image].scale,
                                 excess, to, finish_);
      }
    to_floats(task, image, group, row, excess);
  }

  const T* frame(std::int64_t image, int plane, std::int64_t group) const {
    return frames_ + (image * call_.planes + plane) * call_.frame.values() +
           group * call_.frame.group_values();
  }

  void to_floats(const Task<T>& task, std::int64_t image, std::int64_t group, std::int64_t row,
                 const std::int32_t* excess) const {
    alignas(64) float value[kChunk][kBlockRows], bias[kBlockRows] = {};
    const std::int64_t channels = call_.shape().out_channels;
    const Sink sink{call_.y.floats + image * channels * pixels_, channels, pixels_, call_.y.last};
    if (finish_.bias) std::memcpy(bias, finish_.bias + task.row, task.rows * sizeof(float));
    const bool whole = sink.whole(task);
    float* out = whole ? sink.y + sink.place(task) : value[0];
    const std::int64_t stride = whole ? channels : kBlockRows;
    const float* plus = finish_.plus;
    if (plus) plus += image * channels * pixels_;
    if (plus && whole) {
      plus += sink.place(task);
    } else if (plus) {
      std::memset(value, 0, sizeof value);
      sink.read(task, plus, value);
      plus = out;
    }
    for (int plane = 0; plane < call_.planes; ++plane) {
      const bool done = plane == call_.planes - 1;
      const float scale = kSingle ? 1.0f : of_[image].of_plane(plane);
      Scaling scaling{1,
                      excess,
                      &scale,
                      0,
                      task.panel.scale.data() + row,
                      plane ? nullptr : bias,
                      nullptr,
                      stride,
                      done ? finish_.low : -Finish::kInfinity,
                      done ? finish_.high : Finish::kInfinity,
                      whole_rows(task.rows)};
      const float* more = plane ? out : plus;
      multiply_pixels(call_, task, runs_, frame(image, plane, group),
                      [&](std::int64_t first, std::int64_t n, const auto* sums) {
                        scaling.plus = more ? more + first * stride : nullptr;
                        values(call_.kernels, sums, n, scaling, out + first * stride, stride);
                      });
    }
    if (!whole) sink.write(task, value);
  }

  const Call& call_;
  const T* frames_;
  const std::vector<Quantized> of_;
  const Finish& finish_;
  std::vector<std::int64_t> offset_;
  Runs runs_;
  std::int64_t out_w_, pixels_, step_, chunks_, blocks_, length_;
};

}  // namespace

Rounding rounding_of(const Target& y, const Finish& finish, const float* scale, const float* bias) {
  const float inverse = 1.0f / y.scale.scale;
  Rounding rounding{scale, bias, y.plus, 0, 0.0f, y.plus_scale.zero, 0.0f, 0.0f, y.scale.zero};
  rounding.plus_scale = y.plus_scale.scale * inverse;
  rounding.low = std::max(finish.low * inverse, y.scale.low());
  rounding.high = std::min(finish.high * inverse, y.scale.high());
  return rounding;
}

void ConvShape::check() const {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  for (const std::int64_t size : {channels, out_channels, kernel_h, kernel_w, stride_h, stride_w,
                                  dilation_h, dilation_w, groups})
    require(size >= 1 && size < kMost, "sizes of a convolution must be 1 or more, below 2^31");
  for (const std::int64_t pad : {top, bottom, left, right})
    require(pad >= 0 && pad < kMost, "padding must be 0 or more, below 2^31");
  require(channels % groups == 0 && out_channels % groups == 0, "groups must divide the channels");
  require(product({in_group(), kernel_h, kernel_w}) < kMost / 4, "the window is too large");
}

ConvPanels::ConvPanels(const ConvShape& shape, const RadixCodes& codes, const float* scale,
                       Affine affine, bool tables)
    : shape_(shape) {
  shape.check();
  check_radix(codes.levels, codes.digits);
  const std::int64_t length = shape.in_group() * shape.kernel_h * shape.kernel_w;
  const std::int64_t weights = product({shape.out_channels, length});
  require(codes.bytes == 8 * static_cast<std::size_t>((weights + codes.digits - 1) / codes.digits),
          "words and weights differ in size");
  max_abs_ = largest(affine, codes.levels);
  if (shape.depthwise()) {
    take_taps(codes, scale, affine);
    return;
  }
  std::vector<std::int32_t> order;
  runs_ = runs_of(shape, order);
  const std::int64_t rows = shape.out_channels / shape.groups;
  for (std::int64_t g = 0; g < shape.groups; ++g)
    panels_.push_back(
        make_panel(codes, g * rows, rows, length, order, scale + g * rows, affine, tables));
}

// A depthwise convolution's weights [channels][length], as [length][channels].
void ConvPanels::take_taps(const RadixCodes& codes, const float* scale, Affine affine) {
  const std::int64_t length = shape_.kernel_h * shape_.kernel_w, channels = shape_.channels;
  std::vector<std::uint8_t> code(channels * length);
  radix_unpack_range(codes.words, 0, channels * length, codes.levels, codes.digits, code.data());
  scale_.assign(scale, scale + channels);
  taps_.resize(channels * length), integers_.resize(channels * length);
  for (std::int64_t i = 0; i < channels * length; ++i) {
    if (code[i] >= codes.levels) throw std::invalid_argument("a code is above the grid");
    const std::int64_t place = i % length * channels + i / length;
    integers_[place] = static_cast<std::int16_t>(affine.factor * code[i] - affine.center);
    taps_[place] = static_cast<float>(integers_[place]) * scale[i / length];
  }
}

std::size_t ConvPanels::bytes() const {
  std::size_t total = taps_.size() * sizeof(float) + integers_.size() * sizeof(std::int16_t);
  for (const Panel& panel : panels_) total += panel.bytes();
  return total;
}

std::vector<std::int64_t> conv2d(const Kernels& kernels, const ConvPanels& weight, const float* x,
                                 std::int64_t n, std::int64_t h, std::int64_t w, float* y,
                                 bool last, const Finish& finish, Precision precision,
                                 int threads) {
  return conv2d(kernels, weight, Images{x, last, nullptr, {}}, n, h, w,
                Target{y, last, nullptr, {}, nullptr, {}}, finish, precision, threads);
}

std::vector<std::int64_t> conv2d(const Kernels& kernels, const ConvPanels& weight, const Images& x,
                                 std::int64_t n, std::int64_t h, std::int64_t w, const Target& y,
                                 const Finish& finish, Precision precision, int threads) {
  const ConvShape& s = weight.shape();
  require(h >= 0 && w >= 0 && s.covers(h, w), "images are smaller than the window");
  require(precision == Precision::kInt8 || !(x.bytes || y.bytes), "bytes are int8");
  threads = team_of(threads);
  if (n == 0) return {};
  product({n, s.channels, h + s.top + s.bottom, w + s.left + s.right, 8});
  if (s.depthwise()) {
    depthwise(kernels, weight, x, n, h, w, y, finish, threads);
    return {};
  }
  const bool single = precision == Precision::kFloat32;
  const int planes = planes_of(precision);
  const std::int64_t cost = planes * (single ? 4 : 1) * weight.panels().front().k;
  if (n * s.out_h(h) * s.out_w(w) * s.out_channels * cost < kSerial) threads = 1;
  const Frame frame{s.groups, s.in_group(), h + s.top + s.bottom, w + s.left + s.right};
  const Call call{kernels, weight, x, n, h, w, y, planes, threads, frame};

  thread_local Buffer decoded_scratch, frames_scratch;
  const Panel& first = weight.panels().front();
  const auto room = [&](std::size_t size) {
    return frames_scratch.reserve(n * call.frames() * size);
  };
  if (x.bytes) {
    const std::vector<Quantized> of(n, Quantized{x.scale.scale, 0.0f, true});
    // Without a border, and with bytes as they are, the image is its frame.
    const bool direct = !(s.top | s.bottom | s.left | s.right) && s.groups == 1 && !call.turn();
    auto* frames = direct ? const_cast<std::int8_t*>(reinterpret_cast<const std::int8_t*>(x.bytes))
                          : reinterpret_cast<std::int8_t*>(room(1));
    if (!direct) fill_frames(call, of, frames);
    Product<std::int8_t>(call, frames, of, finish).run(decoded_scratch);
    return {};
  }
  const std::vector<std::int32_t> peaks = peaks_of(call);
  std::vector<std::int64_t> odd;
  if (single) {
    auto* frames = reinterpret_cast<float*>(room(sizeof(float)));
    fill_floats(call, frames);
    Product<float>(call, frames, {}, finish).run(decoded_scratch);
    for (std::int64_t i = 0; i < n; ++i)
      if (may_overflow(peaks[i], first.k, static_cast<float>(first.max_abs))) odd.push_back(i);
    return odd;
  }
  auto* frames = reinterpret_cast<std::int8_t*>(room(1));
  std::vector<Quantized> of;
  for (const std::int32_t peak : peaks) of.push_back(scale_of(peak));
  fill_frames(call, of, frames);
  Product<std::int8_t>(call, frames, of, finish).run(decoded_scratch);
  for (std::int64_t i = 0; i < n; ++i)
    if (!of[i].fits || !weight.scales(of[i].scale)) odd.push_back(i);
  return odd;
}

}  // namespace subbyte
