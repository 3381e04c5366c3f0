// Products in bytes and in float32 by one name, for drivers that are the same for both.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels.hpp"
#include "memory.hpp"

namespace subbyte {

// T: of weights and activations, std::int8_t or float.
template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, float>, float, std::int32_t>;

// A decoded block [k][32 rows] as T; `wide` is room for one that is not in bytes.
template <class T>
const T* weights_as(const Kernels& kernels, const Panel& panel, std::int64_t block,
                    const std::int8_t* decoded, Buffer& wide) {
  if constexpr (std::is_same_v<T, float>) {
    auto* weights = reinterpret_cast<float*>(wide.reserve(panel.k * kBlockRows * sizeof(float)));
    kernels.widen(panel, block, decoded, weights);
    return weights;
  } else {
    return decoded;
  }
}

inline void multiply(const Kernels& kernels, const Panel& panel, const std::int8_t* weights,
                     std::int64_t rows, const Runs& runs, std::int64_t,
                     const std::uint8_t* const* x, std::int32_t* sums) {
  kernels.multiply(weights, panel.max_abs, rows, runs, x, sums);
}
inline void multiply(const Kernels& kernels, const Panel&, const float* weights, std::int64_t rows,
                     const Runs& runs, std::int64_t n, const std::uint8_t* const* x, float* sums) {
  kernels.multiply_float(weights, rows, runs, n, x, sums);
}

inline void values(const Kernels& kernels, const std::int32_t* sums, std::int64_t n,
                   const Scaling& scaling, float* y, std::int64_t step) {
  kernels.values(sums, n, scaling, y, step);
}
inline void values(const Kernels& kernels, const float* sums, std::int64_t n,
                   const Scaling& scaling, float* y, std::int64_t step) {
  kernels.values_float(sums, n, scaling, y, step);
}

}  // namespace subbyte
