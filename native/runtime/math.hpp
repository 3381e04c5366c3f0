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

// x [n][channels][in], weight [out_channels][channels / groups][kernel], bias or null.
void convolve(const Geometry& g, const float* x, const float* weight, const float* bias,
              std::int64_t n, float* y, int threads);
// x [n][channels][in], weight [channels][out_channels / groups][kernel]; `before` as PyTorch's
// padding.
void convolve_transposed(const Geometry& g, const float* x, const float* weight, const float* bias,
                         std::int64_t n, float* y, int threads);

}  // namespace subbyte::runtime
