#include "activations.hpp"

#include <algorithm>

namespace subbyte {

void quantize_column(const Kernels& kernels, const float* x, std::int64_t n, std::int64_t padded,
                     std::uint8_t flip, int planes, std::int8_t* q, std::int64_t stride,
                     Quantized* of) {
  of[0] = kernels.quantize(x, n, padded, flip, q);
  if (planes == 1) return;
  std::int8_t* low = q + stride;
  of[1] = {of[0].scale / 128.0f, 0, of[0].fits};
  if (of[0].scale == 0.0f) {
    std::fill(low, low + padded, static_cast<std::int8_t>(flip));
    return;
  }
  std::fill(low + n, low + padded, static_cast<std::int8_t>(flip));
  const float inverse = 128.0f / of[0].scale;
  constexpr std::int64_t kChunk = 256;
  float rest[kChunk];
  for (std::int64_t start = 0; start < n; start += kChunk) {
    const std::int64_t count = std::min(kChunk, n - start);
    for (std::int64_t i = 0; i < count; ++i)
      rest[i] = x[start + i] - of[0].scale * static_cast<std::int8_t>(q[start + i] ^ flip);
    kernels.round(rest, count, inverse, flip, low + start);
  }
  for (std::int64_t i = 0; i < n; ++i) of[1].sum += static_cast<std::int8_t>(low[i] ^ flip);
}

}  // namespace subbyte
