#include "depthwise.hpp"

#include <algorithm>
#include <cstring>

#include "memory.hpp"
#include "threads.hpp"

namespace subbyte {
namespace {

constexpr std::int64_t kCost = 16;  // 8-bit products that take as long as one of these

struct Call {
  const Kernels& kernels;
  const ConvShape& s;
  const float* weights;  // [kernel_h * kernel_w][channels]
  std::int64_t h, w, out_h, out_w;
  const Finish& finish;
};

// The taps of a window, of those that `inside` lets through. `place` of (ky, kx): where x lies;
// a tap's weights take `width` values.
struct Offsets {
  std::vector<std::int64_t> x, weights;

  template <class Inside, class Place>
  Taps fill(const ConvShape& s, std::int64_t width, Inside&& inside, Place&& place) {
    x.clear(), weights.clear();
    for (std::int64_t ky = 0; ky < s.kernel_h; ++ky)
      for (std::int64_t kx = 0; kx < s.kernel_w; ++kx) {
        if (!inside(ky * s.dilation_h, kx * s.dilation_w)) continue;
        x.push_back(place(ky * s.dilation_h, kx * s.dilation_w));
        weights.push_back((ky * s.kernel_w + kx) * width);
      }
    return {static_cast<int>(x.size()), x.data(), weights.data()};
  }
};

// Neighbouring pixels taken together, so that their channels fill whole vectors: where there are
// few channels, and windows move by one pixel.
struct Together {
  std::int64_t pixels = 1, width;    // width: values of so many pixels
  std::vector<float> weights, bias;  // as a call has them, repeated: [taps][width], [width]

  explicit Together(const Call& call) : width(call.s.channels) {
    constexpr std::int64_t kFew = 2 * kRowStep;
    const ConvShape& s = call.s;
    if (s.stride_w != 1 || s.channels >= kFew || s.channels % kRowStep == 0) return;
    while (pixels * s.channels % kRowStep) ++pixels;
    width = pixels * s.channels;
    const auto repeat = [&](const float* from, std::vector<float>& to) {
      for (std::int64_t i = 0; i < pixels; ++i) to.insert(to.end(), from, from + s.channels);
    };
    for (std::int64_t t = 0; t < s.kernel_h * s.kernel_w; ++t)
      repeat(call.weights + t * s.channels, weights);
    if (call.finish.bias) repeat(call.finish.bias, bias);
  }
};

// Pixels of a row of results that have the same taps, one behind another; where values lie is
// counted from the first row of the image that the window covers.
struct Segment {
  std::int64_t column, n;
  std::vector<std::int64_t> x, weights, together;  // together: of the weights of `Together`

  Taps taps(const std::vector<std::int64_t>& of) const {
    return {static_cast<int>(x.size()), x.data(), of.data()};
  }
};

// All of a row whose windows begin in row `top` of the image, which may lie above it.
// width: of the weights of pixels that are taken together.
std::vector<Segment> segments_of(const Call& call, std::int64_t width, std::int64_t top) {
  const ConvShape& s = call.s;
  const std::int64_t reach = (s.kernel_w - 1) * s.dilation_w,
                     first = std::max<std::int64_t>(top, 0);
  std::vector<Segment> row;
  for (std::int64_t column = 0; column < call.out_w; column += row.back().n) {
    const std::int64_t left = column * s.stride_w - s.left, right = left + reach;
    Offsets offsets;
    offsets.fill(
        s, s.channels,
        [&](std::int64_t dy, std::int64_t dx) {
          return top + dy >= 0 && top + dy < call.h && left + dx >= 0 && left + dx < call.w;
        },
        [&](std::int64_t dy, std::int64_t dx) {
          return ((top + dy - first) * call.w + left + dx) * s.channels;
        });
    // All whose windows lie between the left and the right border have the same taps.
    const std::int64_t same =
        left >= 0 && right < call.w ? (call.w - 1 - right) / s.stride_w + 1 : 1;
    row.push_back({column,
                   std::min(same, call.out_w - column),
                   std::move(offsets.x),
                   std::move(offsets.weights),
                   {}});
    for (const std::int64_t place : row.back().weights)
      row.back().together.push_back(place / s.channels * width);
  }
  return row;
}

// x: the first row of the image that windows cover; out, finish.plus: of the row's first pixel.
void pixels_of(const Call& call, const Together& together, const Segment& segment, const float* x,
               const Finish& finish, float* out) {
  const std::int64_t channels = call.s.channels, step = call.s.stride_w * channels, n = segment.n;
  const auto take = [&](std::int64_t first, std::int64_t count, bool alone) {
    Finish of = finish;
    if (of.bias && !alone) of.bias = together.bias.data();
    const std::int64_t place = (segment.column + first) * channels;
    if (of.plus) of.plus += place;
    if (alone)
      call.kernels.pixels(segment.taps(segment.weights), x, step, call.weights, channels, count, of,
                          out + place);
    else  // the windows of neighbours are neighbours
      call.kernels.pixels(segment.taps(segment.together), x + first * channels, together.width,
                          together.weights.data(), together.width, count, of, out + place);
  };
  if (together.pixels == 1 || n < together.pixels) return take(0, n, true);
  take(0, n / together.pixels, false);
  if (n % together.pixels) take(n - together.pixels, 1, false);  // some of them once more
}

// Rows of results of images [h][w][channels].
class Rows {
 public:
  explicit Rows(const Call& call) : call_(call), together_(call) {
    if (call.h > reach()) inner_ = segments_of(call, together_.width, 0);
  }

  // plus: as `out` lies, or null.
  void convolve(const float* x, std::int64_t y, float* out, const float* plus) const {
    const std::int64_t top = y * call_.s.stride_h - call_.s.top;
    x += std::max<std::int64_t>(top, 0) * call_.w * call_.s.channels;
    Finish finish = call_.finish;
    if (plus) finish.plus = plus;
    if (top >= 0 && top + reach() < call_.h) {
      for (const Segment& segment : inner_) pixels_of(call_, together_, segment, x, finish, out);
      return;
    }
    for (const Segment& segment : segments_of(call_, together_.width, top))
      pixels_of(call_, together_, segment, x, finish, out);
  }

 private:
  std::int64_t reach() const { return (call_.s.kernel_h - 1) * call_.s.dilation_h; }

  const Call& call_;
  Together together_;
  std::vector<Segment> inner_;  // of a row whose windows lie between the image's first and last row
};

// Planes [h][w], one at a time, with a border; columns a stride apart lie together: [h + border]
// [stride_w][pitch].
class Planes {
 public:
  explicit Planes(const Call& call)
      : call_(call),
        pitch_((call.w + call.s.left + call.s.right + call.s.stride_w - 1) / call.s.stride_w +
               kRowStep),
        row_((call.out_w + kRowStep - 1) / kRowStep * kRowStep) {
    thread_local Buffer scratch;
    const std::int64_t values = (call.h + call.s.top + call.s.bottom) * pitch_ * call.s.stride_w;
    padded_ = reinterpret_cast<float*>(scratch.reserve((values + row_) * sizeof(float)));
    std::memset(padded_, 0, (values + row_) * sizeof(float));
    result_ = padded_ + values;
    taps_ = offsets_.fill(
        call.s, call.s.channels, [](std::int64_t, std::int64_t) { return true; },
        [&](std::int64_t dy, std::int64_t dx) { return place(dy, dx); });
  }

  // plus: as `out` lies, or null.
  void convolve(const float* x, std::int64_t channel, float* out, const float* plus) {
    const ConvShape& s = call_.s;
    for (std::int64_t y = 0; y < call_.h; ++y, x += call_.w)
      for (std::int64_t i = 0; i < std::min(s.stride_w, call_.w); ++i)
        spread(x + i, s.stride_w, (call_.w - 1 - i) / s.stride_w + 1,
               padded_ + place(y + s.top, i + s.left));
    Finish finish = call_.finish;
    if (finish.bias) finish.bias += channel;
    if (plus) finish.plus = result_;
    for (std::int64_t y = 0; y < call_.out_h; ++y) {
      if (plus) std::memcpy(result_, plus + y * call_.out_w, call_.out_w * sizeof(float));
      call_.kernels.row(taps_, padded_ + place(y * s.stride_h, 0), call_.weights + channel, row_,
                        finish, result_);
      std::memcpy(out + y * call_.out_w, result_, call_.out_w * sizeof(float));
    }
  }

 private:
  static void spread(const float* x, std::int64_t stride, std::int64_t n, float* out) {
    if (stride == 1)
      std::memcpy(out, x, n * sizeof(float));
    else if (stride == 2)  // for the compiler: this one it can do in vectors
      for (std::int64_t i = 0; i < n; ++i) out[i] = x[i * 2];
    else
      for (std::int64_t i = 0; i < n; ++i) out[i] = x[i * stride];
  }

  std::int64_t place(std::int64_t y, std::int64_t x) const {
    return (y * call_.s.stride_w + x % call_.s.stride_w) * pitch_ + x / call_.s.stride_w;
  }

  const Call& call_;
  std::int64_t pitch_, row_;
  float *padded_, *result_;
  Offsets offsets_;
  Taps taps_;
};

}  // namespace

namespace {

// A row of results of an image of bytes; `rounding.plus` and `out` are of its first pixel.
void bytes_of_row(const Call& call, const std::vector<Segment>& row, const std::uint8_t* x,
                  const std::int16_t* weights, int zero, bool narrow, const Rounding& rounding,
                  std::uint8_t* out) {
  const std::int64_t channels = call.s.channels;
  for (const Segment& segment : row) {
    Rounding of = rounding;
    if (of.plus) of.plus += segment.column * channels;
    call.kernels.pixels_bytes(segment.taps(segment.weights), x, call.s.stride_w * channels, zero,
                              weights, channels, segment.n, narrow, of,
                              out + segment.column * channels);
  }
}

void depthwise_bytes(const Call& call, const ConvPanels& weight, const Images& x, std::int64_t n,
                     const Target& y, int threads) {
  const ConvShape& s = call.s;
  const std::int64_t channels = s.channels, taps = s.kernel_h * s.kernel_w;
  const bool narrow = weight.max_abs() * 255 * taps <= 32767;
  const float inverse = 1.0f / y.scale.scale;
  std::vector<float> scale(channels), bias(channels);
  for (std::int64_t c = 0; c < channels; ++c) {
    scale[c] = x.scale.scale * weight.scale()[c] * inverse;
    if (call.finish.bias) bias[c] = call.finish.bias[c] * inverse;
  }
  const Rounding rounding = rounding_of(y, call.finish, scale.data(), bias.data());
  const std::int64_t reach = (s.kernel_h - 1) * s.dilation_h;
  std::vector<Segment> inner;  // of rows whose windows lie between the first and the last row
  if (call.h > reach) inner = segments_of(call, channels, 0);
  parallel(threads, n * call.out_h, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t place = i * call.out_w * channels;
      const std::int64_t top = i % call.out_h * s.stride_h - s.top;
      const std::uint8_t* rows =
          x.bytes + (i / call.out_h * call.h + std::max<std::int64_t>(top, 0)) * call.w * channels;
      const bool inside = top >= 0 && top + reach < call.h;
      Rounding own = rounding;
      if (own.plus) own.plus += place;
      bytes_of_row(call, inside ? inner : segments_of(call, channels, top), rows,
                   weight.integers().data(), x.scale.zero, narrow, own, y.bytes + place);
    }
  });
}

}  // namespace

void depthwise(const Kernels& kernels, const ConvPanels& weight, const Images& images,
               std::int64_t n, std::int64_t h, std::int64_t w, const Target& target,
               const Finish& finish, int threads) {
  const ConvShape& s = weight.shape();
  const Call call{kernels, s, weight.taps().data(), h, w, s.out_h(h), s.out_w(w), finish};
  const std::int64_t in = h * w, out = call.out_h * call.out_w;
  const std::int64_t cost = images.bytes ? kCost / 4 : kCost;
  if (n * s.channels * out * s.kernel_h * s.kernel_w * cost < kSerial) threads = 1;
  if (images.bytes) return depthwise_bytes(call, weight, images, n, target, threads);
  const float* x = images.floats;
  float* y = target.floats;
  if (target.last) {
    const Rows rows(call);
    parallel(threads, n * call.out_h, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t place = i * call.out_w * s.channels;
        rows.convolve(x + i / call.out_h * in * s.channels, i % call.out_h, y + place,
                      finish.plus ? finish.plus + place : nullptr);
      }
    });
    return;
  }
  parallel(threads, n * s.channels, [&](std::int64_t begin, std::int64_t end) {
    Planes planes(call);
    for (std::int64_t i = begin; i < end; ++i)
      planes.convolve(x + i * in, i % s.channels, y + i * out,
                      finish.plus ? finish.plus + i * out : nullptr);
  });
}

}  // namespace subbyte
