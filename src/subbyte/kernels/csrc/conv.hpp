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
  std::size_t bytes() const;
  // As of `Panel`, of all of them.
  bool scales(float activation) const {
    return std::all_of(panels_.begin(), panels_.end(),
                       [&](const Panel& panel) { return panel.scales(activation); });
  }

 private:
  ConvShape shape_;
  std::vector<Panel> panels_;  // of each group, or, for a depthwise convolution,
  std::vector<float> taps_;    // [kernel_h * kernel_w][channels]
};

// y = conv(x, weight), finished, for x [n, channels, h, w], float32. x and y lie as N H W C
// (`last`) or as N C H W. Each image has a scale of its own.
// Returns the images that have none, as `linear` does its rows. Depthwise convolutions round
// nothing. Throws std::invalid_argument for images smaller than the window.
std::vector<std::int64_t> conv2d(const Kernels& kernels, const ConvPanels& weight, const float* x,
                                 std::int64_t n, std::int64_t h, std::int64_t w, float* y,
                                 bool last, const Finish& finish, Precision precision, int threads);

}  // namespace subbyte
