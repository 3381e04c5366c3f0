// Depthwise convolutions. Floats stay floats: a value is read for a few products only, so that
// rounding it first would cost more than the products do. Bytes are multiplied as they are.
#pragma once

#include "conv.hpp"

namespace subbyte {

// `conv2d` for weight.shape().depthwise(), floats to floats or bytes to bytes. Every image has a
// result.
void depthwise(const Kernels& kernels, const ConvPanels& weight, const Images& x, std::int64_t n,
               std::int64_t h, std::int64_t w, const Target& y, const Finish& finish, int threads);

}  // namespace subbyte
