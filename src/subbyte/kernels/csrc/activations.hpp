// Float activations as columns of 8-bit integers, each with a scale of its own.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace subbyte {

constexpr std::int64_t kSerial = std::int64_t{1} << 21;  // products that one thread does sooner

// How activations are rounded.
enum class Precision {
  kInt8,     // 127 steps to the largest: an error of at most 1/254 of it
  kInt16,    // two 8-bit planes, 128 times finer
  kFloat32,  // not at all: weights become float32 instead, a block at a time
};

constexpr int planes_of(Precision precision) { return precision == Precision::kInt16 ? 2 : 1; }

// x = scale * q with q in -127..127; a second plane has q / 128 of the same scale.
struct Quantized {
  float scale = 0.0f, inverse = 0.0f;  // 0 for zeros only and where nothing fits
  bool fits = true;  // false: no scale suits x (NaN, infinity, only tiny values); q is 0

  float of_plane(int plane) const { return plane ? scale / 128.0f : scale; }
};

// For a column whose largest magnitude has these bits (`Kernels::peak`).
Quantized scale_of(std::int32_t peak);

// Whether sums of k float32 activations times weights of magnitude `most` may overflow before they
// are scaled, where the largest activation has these bits. False where one is not finite: then the
// sums are not, either.
bool may_overflow(std::int32_t peak, std::int64_t k, float most);

// The planes of x [n]: plane p is q[p * stride ...]. Every byte is xored with `flip`.
void round_planes(const Kernels& kernels, const float* x, std::int64_t n, const Quantized& of,
                  std::uint8_t flip, int planes, std::int8_t* q, std::int64_t stride);

}  // namespace subbyte
