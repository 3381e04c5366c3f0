// Linear layers: quantize the activations, multiply in integers, scale back.
#pragma once

#include <cstdint>
#include <vector>

#include "activations.hpp"
#include "panels.hpp"

namespace subbyte {

// y[i * panel.rows + r] = sum over k of x[i * panel.inputs() + k] * weight[r][k], finished, i < n,
// with a scale for each row of x. Returns the rows of x that have none (NaN, infinity, or all
// values too small), or whose sums may overflow in float32: what y holds there is not their
// product.
std::vector<std::int64_t> linear(const Kernels& kernels, const Panel& panel, const float* x,
                                 std::int64_t n, float* y, const Finish& finish,
                                 Precision precision, int threads);

// The same of bytes x [n][panel.inputs()] that have a scale already; not for weights of a row that
// share scales.
void linear(const Kernels& kernels, const Panel& panel, const std::uint8_t* x, ByteScale of,
            std::int64_t n, float* y, const Finish& finish, int threads);

}  // namespace subbyte
