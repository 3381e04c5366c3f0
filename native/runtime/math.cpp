#include "math.hpp"

#include <cmath>
#include <cstring>
#include <limits>

namespace subbyte::runtime {

Shape strides_of(const Shape& shape) {
  Shape strides(shape.size());
  std::int64_t step = 1;
  for (std::size_t d = shape.size(); d-- > 0; step *= std::max<std::int64_t>(shape[d], 1))
    strides[d] = step;
  return strides;
}

float dot(const float* a, const float* b, std::int64_t n) {
  constexpr int kLanes = 16;
  float sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (; i < n; ++i) sums[i % kLanes] += a[i] * b[i];
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

void multiply_rows(const float* a, const float* w, const float* bias, std::int64_t m,
                   std::int64_t n, std::int64_t k, float* y, int threads) {
  spread(threads, m * n, k, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      y[i] = dot(a + i / n * k, w + i % n * k, k) + (bias ? bias[i % n] : 0.0f);
  });
}

void multiply_plain(const float* a, const float* b, std::int64_t m, std::int64_t n, std::int64_t k,
                    float* y, int threads) {
  spread(threads, m, n * k, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      float* row = y + i * n;
      std::fill_n(row, n, 0.0f);
      for (std::int64_t j = 0; j < k; ++j) {
        const float factor = a[i * k + j];
        for (std::int64_t c = 0; c < n; ++c) row[c] += factor * b[j * n + c];
      }
    }
  });
}

void softmax(const float* x, std::int64_t n, float* y) {
  float most = -std::numeric_limits<float>::infinity();
  for (std::int64_t i = 0; i < n; ++i) most = x[i] > most || std::isnan(x[i]) ? x[i] : most;
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += y[i] = std::exp(x[i] - most);
  const float total = static_cast<float>(sum);
  for (std::int64_t i = 0; i < n; ++i) y[i] /= total;
}

namespace {

template <class T>
void copy_values(const T* x, const Shape& strides, const Shape& shape, T* y) {
  const std::size_t rank = shape.size();
  const std::int64_t inner = rank ? shape[rank - 1] : 1, step = rank ? strides[rank - 1] : 1;
  const std::int64_t rows = inner ? count_of(shape) / inner : 0;
  Shape at(rank, 0);
  std::int64_t place = 0;
  for (std::int64_t row = 0; row < rows; ++row, y += inner) {
    if (step == 1)
      std::memcpy(y, x + place, inner * sizeof(T));
    else
      for (std::int64_t i = 0; i < inner; ++i) y[i] = x[place + i * step];
    for (std::size_t d = rank; d-- > 1;) {
      place += strides[d - 1];
      if (++at[d - 1] < shape[d - 1]) break;
      place -= strides[d - 1] * shape[d - 1];
      at[d - 1] = 0;
    }
  }
}

}  // namespace

void copy_strided(const std::uint8_t* x, std::int64_t offset, const Shape& strides,
                  const Shape& shape, std::size_t size, std::uint8_t* y) {
  const auto copy = [&](auto unit) {
    using T = decltype(unit);
    copy_values(reinterpret_cast<const T*>(x) + offset, strides, shape, reinterpret_cast<T*>(y));
  };
  if (size == 8)
    copy(std::uint64_t{});
  else if (size == 4)
    copy(std::uint32_t{});
  else if (size == 2)
    copy(std::uint16_t{});
  else
    copy(std::uint8_t{});
}

void convolve(const Geometry& g, const float* x, const float* weight, const float* bias,
              std::int64_t n, float* y, int threads) {
  const std::int64_t in = g.channels / g.groups, rows = g.out_channels / g.groups;
  const std::int64_t plane = g.in_values(), result = g.out_values(), step = g.stride[2];
  spread(threads, n * g.out_channels, result * g.taps() * in,
         [&](std::int64_t begin, std::int64_t end) {
           for (std::int64_t i = begin; i < end; ++i) {
             const std::int64_t channel = i % g.out_channels, group = channel / rows;
             float* out = y + i * result;
             std::fill_n(out, result, 0.0f);
             for (std::int64_t c = 0; c < in; ++c) {
               const float* image = x + (i / g.out_channels * g.channels + group * in + c) * plane;
               const float* taps = weight + (channel * in + c) * g.taps();
               for_runs(
                   g, g.in, g.out,
                   [&](std::int64_t tap, std::int64_t from, std::int64_t to, std::int64_t count) {
                     const float factor = taps[tap];
                     if (step == 1)
                       for (std::int64_t k = 0; k < count; ++k)
                         out[to + k] += factor * image[from + k];
                     else
                       for (std::int64_t k = 0; k < count; ++k)
                         out[to + k] += factor * image[from + k * step];
                   });
             }
             if (bias)
               for (std::int64_t k = 0; k < result; ++k) out[k] += bias[channel];
           }
         });
}

void convolve_transposed(const Geometry& g, const float* x, const float* weight, const float* bias,
                         std::int64_t n, float* y, int threads) {
  const std::int64_t in = g.channels / g.groups, rows = g.out_channels / g.groups;
  const std::int64_t plane = g.in_values(), result = g.out_values(), step = g.stride[2];
  spread(threads, n * g.out_channels, plane * g.taps() * in,
         [&](std::int64_t begin, std::int64_t end) {
           for (std::int64_t i = begin; i < end; ++i) {
             const std::int64_t channel = i % g.out_channels, group = channel / rows;
             float* out = y + i * result;
             std::fill_n(out, result, 0.0f);
             for (std::int64_t c = 0; c < in; ++c) {
               const std::int64_t from = group * in + c;
               const float* image = x + (i / g.out_channels * g.channels + from) * plane;
               const float* taps = weight + (from * rows + channel % rows) * g.taps();
               for_runs(
                   g, g.out, g.in,
                   [&](std::int64_t tap, std::int64_t to, std::int64_t at, std::int64_t count) {
                     const float factor = taps[tap];
                     for (std::int64_t k = 0; k < count; ++k)
                       out[to + k * step] += factor * image[at + k];
                   });
             }
             if (bias)
               for (std::int64_t k = 0; k < result; ++k) out[k] += bias[channel];
           }
         });
}

}  // namespace subbyte::runtime
