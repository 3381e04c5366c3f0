// Loops that several operators share; float32 unless said otherwise.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "tensor.hpp"
#include "threads.hpp"

namespace subbyte::runtime {

constexpr std::int64_t kGrain = 1 << 15;  // values that one thread does sooner

// f(begin, end) over [0, n) by several threads where a unit of n costs `cost` values.
template <class F>
void spread(int threads, std::int64_t n, std::int64_t cost, F&& f) {
  if (n <= 0) return;
  if (n * std::max<std::int64_t>(cost, 1) < kGrain) threads = 1;
  parallel(team_of(threads), n, f);
}

// Strides in values of a tensor without gaps.
Shape strides_of(const Shape& shape);

// The sum of a[i] * b[i]; several sums side by side, in an order of its own.
float dot(const float* a, const float* b, std::int64_t n);

// y [m][n] = a [m][k] times w [n][k] turned, plus bias [n] or null.
void multiply_rows(const float* a, const float* w, const float* bias, std::int64_t m,
                   std::int64_t n, std::int64_t k, float* y, int threads);
// y [m][n] = a [m][k] times b [k][n].
void multiply_plain(const float* a, const float* b, std::int64_t m, std::int64_t n, std::int64_t k,
                    float* y, int threads);

// Exponentials and a sum: x [n] becomes softmax(x); all -inf gives NaN, as in PyTorch.
void softmax(const float* x, std::int64_t n, float* y);

// Copies a tensor of `shape` whose values lie `strides` (in values) apart from x + offset on.
void copy_strided(const std::uint8_t* x, std::int64_t offset, const Shape& strides,
                  const Shape& shape, std::size_t size, std::uint8_t* y);

// A convolution of any kind in float32, up to three dimensions in space (1 where there are fewer).
struct Geometry {
  std::int64_t channels = 1, out_channels = 1, groups = 1;
  std::array<std::int64_t, 3> in{1, 1, 1}, out{1, 1, 1}, kernel{1, 1, 1}, stride{1, 1, 1},
      dilation{1, 1, 1}, before{0, 0, 0};

  std::int64_t in_values() const { return in[0] * in[1] * in[2]; }
  std::int64_t out_values() const { return out[0] * out[1] * out[2]; }
  std::int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// Places o of [0, out) with 0 <= o * stride + shift < in.
inline void range_of(std::int64_t shift, std::int64_t stride, std::int64_t in, std::int64_t out,
                     std::int64_t& first, std::int64_t& last) {
  first = shift < 0 ? (-shift + stride - 1) / stride : 0;
  last = in > shift ? std::min(out, (in - 1 - shift) / stride + 1) : 0;
}

// f(tap, place in a plane of `wide`, place in a plane of `narrow`, n): runs of n values, of which
// those of `wide` lie stride[2] apart. narrow o and wide i meet where i = o * stride + shift.
template <class F>
void for_runs(const Geometry& g, const std::array<std::int64_t, 3>& wide,
              const std::array<std::int64_t, 3>& narrow, F&& f) {
  std::int64_t tap = 0;
  for (std::int64_t a = 0; a < g.kernel[0]; ++a)
    for (std::int64_t b = 0; b < g.kernel[1]; ++b)
      for (std::int64_t c = 0; c < g.kernel[2]; ++c, ++tap) {
        const std::int64_t shift[3] = {a * g.dilation[0] - g.before[0],
                                       b * g.dilation[1] - g.before[1],
                                       c * g.dilation[2] - g.before[2]};
        std::int64_t first[3], last[3];
        for (int d = 0; d < 3; ++d)
          range_of(shift[d], g.stride[d], wide[d], narrow[d], first[d], last[d]);
        if (first[2] >= last[2]) continue;
        for (std::int64_t z = first[0]; z < last[0]; ++z)
          for (std::int64_t y = first[1]; y < last[1]; ++y) {
            const std::int64_t row =
                (z * g.stride[0] + shift[0]) * wide[1] + y * g.stride[1] + shift[1];
            f(tap, row * wide[2] + first[2] * g.stride[2] + shift[2],
              (z * narrow[1] + y) * narrow[2] + first[2], last[2] - first[2]);
          }
      }
}

// x [n][channels][in], weight [out_channels][channels / groups][kernel], bias or null.
void convolve(const Geometry& g, const float* x, const float* weight, const float* bias,
              std::int64_t n, float* y, int threads);
// x [n][channels][in], weight [channels][out_channels / groups][kernel]; `before` as PyTorch's
// padding.
void convolve_transposed(const Geometry& g, const float* x, const float* weight, const float* bias,
                         std::int64_t n, float* y, int threads);

}  // namespace subbyte::runtime
