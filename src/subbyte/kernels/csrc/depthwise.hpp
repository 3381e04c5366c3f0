// Depthwise convolutions, in float32: a value is read for a few products only, so that rounding it
// first would cost more than the products do.
#pragma once

#include "conv.hpp"

namespace subbyte {

// `conv2d` for weight.shape().depthwise(). Every image has a result.
void depthwise(const Kernels& kernels, const ConvPanels& weight, const float* x, std::int64_t n,
               std::int64_t h, std::int64_t w, float* y, bool last, const Finish& finish,
               int threads);

}  // namespace subbyte
