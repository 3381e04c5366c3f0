// Float activations as columns of 8-bit integers, each with a scale of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace subbyte {

constexpr std::int64_t kSerial = std::int64_t{1} << 21;  // products that one thread does sooner

// How activations are rounded.
enum class Precision {
  kInt8,   // 127 steps to the largest: an error of at most 1/254 of it
  kInt16,  // two 8-bit planes, 128 times finer
};

constexpr int planes_of(Precision precision) { return precision == Precision::kInt16 ? 2 : 1; }

// The planes of one column x [n]: plane p is q[p * stride ...], with of[p]. Bytes up to `padded`
// are 0. Every byte is xored with `flip`.
void quantize_column(const Kernels& kernels, const float* x, std::int64_t n, std::int64_t padded,
                     std::uint8_t flip, int planes, std::int8_t* q, std::int64_t stride,
                     Quantized* of);

}  // namespace subbyte
