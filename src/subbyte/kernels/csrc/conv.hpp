// Two-dimensional convolutions as implicit matrix products over padded 8-bit images.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "activations.hpp"
#include "panels.hpp"

namespace subbyte {

struct ConvShape {
  std::int64_t channels, out_channels;  // of all groups
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  std::int64_t top, bottom, left, right;  // zero padding
  std::int64_t groups;

  // Throws std::invalid_argument for sizes that no convolution has.
  void check() const;

  std::int64_t in_group() const { return channels / groups; }
  bool depthwise() const { return in_group() == 1 && out_channels == channels; }
  // Whether the window fits into images of this size, padding included.
  bool covers(std::int64_t h, std::int64_t w) const {
    return h + top + bottom > dilation_h * (kernel_h - 1) &&
           w + left + right > dilation_w * (kernel_w - 1);
  }
  std::int64_t out_h(std::int64_t h) const {
    return (h + top + bottom - dilation_h * (kernel_h - 1) - 1) / stride_h + 1;
  }
  std::int64_t out_w(std::int64_t w) const {
    return (w + left + right - dilation_w * (kernel_w - 1) - 1) / stride_w + 1;
  }
};

// The runs of neighbouring bytes of a window: where in it they begin, their groups of 4 k, and
// their k without padding.
struct WindowRuns {
  std::vector<std::int64_t> y, x;
  std::vector<std::int32_t> length, values;
};

// A convolution's weight [out, in / groups, kh, kw], repacked. Throws what `make_panel` and
// `ConvShape::check` throw. scale: [out].
class ConvPanels {
 public:
  ConvPanels(const ConvShape& shape, const RadixCodes& codes, const float* scale, Affine affine,
             bool tables);
  ConvPanels(ConvPanels&&) = default;
  ConvPanels(const ConvPanels&) = delete;

  const ConvShape& shape() const { return shape_; }
  const std::vector<Panel>& panels() const { return panels_; }
  const std::vector<float>& taps() const { return taps_; }
  const WindowRuns& runs() const { return runs_; }
  // Of a depthwise convolution, its weights as integers [kernel_h * kernel_w][channels], the
  // largest magnitude of one, and what they are multiplied with, [channels].
  const std::vector<std::int16_t>& integers() const { return integers_; }
  int max_abs() const { return max_abs_; }
  const std::vector<float>& scale() const { return scale_; }
  std::size_t bytes() const;
  // As of `Panel`, of all of them.
  bool scales(float activation) const {
    return std::all_of(panels_.begin(), panels_.end(),
                       [&](const Panel& panel) { return panel.scales(activation); });
  }

 private:
  void take_taps(const RadixCodes& codes, const float* scale, Affine affine);

  ConvShape shape_;
  WindowRuns runs_;
  std::vector<Panel> panels_;  // of each group, or, for a depthwise convolution,
  std::vector<float> taps_;    // [kernel_h * kernel_w][channels]
  std::vector<std::int16_t> integers_;
  std::vector<float> scale_;
  int max_abs_ = 0;
};

// Images: float32, N H W C (`last`) or N C H W, or bytes with their scale, N H W C.
struct Images {
  const float* floats = nullptr;
  bool last = false;
  const std::uint8_t* bytes = nullptr;
  ByteScale scale;
};

// Where a convolution's values go, in the same forms. plus: of bytes, what is added to the products
// before they are rounded, or null; as the result lies.
struct Target {
  float* floats = nullptr;
  bool last = false;
  std::uint8_t* bytes = nullptr;
  ByteScale scale;
  const std::uint8_t* plus = nullptr;
  ByteScale plus_scale;
};

// y = conv(x, weight), finished, for x [n, channels, h, w], float32. x and y lie as N H W C
// (`last`) or as N C H W. Each image has a scale of its own.
// Returns the images that have none, as `linear` does its rows. Depthwise convolutions round
// nothing. Throws std::invalid_argument for images smaller than the window.
std::vector<std::int64_t> conv2d(const Kernels& kernels, const ConvPanels& weight, const float* x,
                                 std::int64_t n, std::int64_t h, std::int64_t w, float* y,
                                 bool last, const Finish& finish, Precision precision, int threads);

// The same from and to either form. Bytes are multiplied as they are, and their result is
//   round(sum * (x's scale * row's / y's) + bias / y's + (plus - its zero) * (plus's scale / y's)),
// ties to even, in float32 from left to right, moved into the limits of `finish` and of y. Bytes
// come out of Precision::kInt8 alone; `finish.plus` is for floats. A depthwise convolution takes
// bytes where it gives bytes.
std::vector<std::int64_t> conv2d(const Kernels& kernels, const ConvPanels& weight, const Images& x,
                                 std::int64_t n, std::int64_t h, std::int64_t w, const Target& y,
                                 const Finish& finish, Precision precision, int threads);

// What turns sums into bytes: the limits of `finish` and of y, and the scale of `y.plus`. scale and
// bias: of each row, in units of y's scale.
Rounding rounding_of(const Target& y, const Finish& finish, const float* scale, const float* bias);

}  // namespace subbyte
