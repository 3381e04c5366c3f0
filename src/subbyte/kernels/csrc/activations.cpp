#include "activations.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

namespace subbyte {

Quantized scale_of(std::int32_t peak) {
  constexpr std::int32_t kInfinity = 0x7F800000, kTiny = 0x05000000;  // 127 / x must be finite
  Quantized of;
  of.fits = peak == 0 || (peak > kTiny && peak < kInfinity);
  if (peak == 0 || !of.fits) return of;
  float largest;
  std::memcpy(&largest, &peak, 4);
  of.scale = largest / 127.0f;
  of.inverse = 127.0f / largest;
  return of;
}

bool may_overflow(std::int32_t peak, std::int64_t k, float most) {
  constexpr std::int32_t kInfinity = 0x7F800000;
  const float limit = std::numeric_limits<float>::max() / (2.0f * most * static_cast<float>(k));
  std::int32_t bits;
  std::memcpy(&bits, &limit, 4);
  return peak > bits && peak < kInfinity;
}

void round_planes(const Kernels& kernels, const float* x, std::int64_t n, const Quantized& of,
                  std::uint8_t flip, int planes, std::int8_t* q, std::int64_t stride) {
  if (of.scale == 0.0f) {
    for (int plane = 0; plane < planes; ++plane) std::memset(q + plane * stride, flip, n);
    return;
  }
  kernels.round(x, n, of.inverse, flip, q);
  if (planes == 1) return;
  constexpr std::int64_t kChunk = 256;
  float rest[kChunk];
  for (std::int64_t start = 0; start < n; start += kChunk) {
    const std::int64_t count = std::min(kChunk, n - start);
    for (std::int64_t i = 0; i < count; ++i)
      rest[i] = x[start + i] - of.scale * static_cast<std::int8_t>(q[start + i] ^ flip);
    kernels.round(rest, count, 128.0f / of.scale, flip, q + stride + start);
  }
}

}  // namespace subbyte
