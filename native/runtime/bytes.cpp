#include "bytes.hpp"

#include <algorithm>
#include <vector>

#include "math.hpp"

namespace subbyte::runtime {
namespace {

constexpr std::int64_t kTile = 16;

// f(place among channels first, place among channels last) of an image, a tile after another.
template <class F>
void for_both_orders(std::int64_t channels, std::int64_t pixels, F&& f) {
  for (std::int64_t c0 = 0; c0 < channels; c0 += kTile)
    for (std::int64_t p = 0; p < pixels; ++p)
      for (std::int64_t c = c0; c < std::min(channels, c0 + kTile); ++c)
        f(c * pixels + p, p * channels + c);
}

struct Images {
  std::int64_t n = 1, channels = 1, pixels = 1;

  explicit Images(const Value& x) {
    if (x.rank() == 4)
      n = x.shape[0], channels = x.shape[1], pixels = x.shape[2] * x.shape[3];
    else
      channels = x.count();
  }
  std::int64_t values() const { return channels * pixels; }
};

}  // namespace

Shape shape_in_memory(const Value& x) {
  if (!x.in_bytes() || x.rank() != 4) return x.shape;
  return {x.shape[0], x.shape[2], x.shape[3], x.shape[1]};
}

int axis_in_memory(const Value& x, int axis) {
  constexpr int kPlaces[] = {0, 3, 1, 2};
  return x.rank() == 4 ? kPlaces[axis] : axis;
}

void floats_from_bytes(const Value& bytes, const Value& y, const Run& run) {
  const Images of(bytes);
  const std::uint8_t* in = run.in<std::uint8_t>(bytes);
  float* out = run.out<float>(y);
  const ByteScale s = bytes.scale;
  spread(run.threads, of.n, of.values(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::uint8_t* image = in + i * of.values();
      float* to = out + i * of.values();
      for_both_orders(of.channels, of.pixels, [&](std::int64_t first, std::int64_t last) {
        to[first] = static_cast<float>(image[last] - s.zero) * s.scale;
      });
    }
  });
}

std::uint8_t rounded(float value, float inverse, ByteScale scale) {
  const float scaled = value * inverse;
  const float above = scaled > scale.low() ? scaled : scale.low();
  const float within = above < scale.high() ? above : scale.high();
  const float whole = (within + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: ties to even
  return static_cast<std::uint8_t>(static_cast<int>(whole) + scale.zero);
}

void bytes_from_floats(const float* from, std::int64_t images, const Value& like, std::uint8_t* to,
                       int threads) {
  const Images of(like);
  const float inverse = 1.0f / like.scale.scale;
  spread(threads, images, of.values(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float* image = from + i * of.values();
      std::uint8_t* out = to + i * of.values();
      for_both_orders(of.channels, of.pixels, [&](std::int64_t first, std::int64_t last) {
        out[last] = rounded(image[first], inverse, like.scale);
      });
    }
  });
}

Value to_bytes(Op& op, const Value& x, ByteScale scale) {
  const Value y = op.make_bytes(x.shape, scale);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        bytes_from_floats(run.in<float>(x), Images(y).n, y, run.out<std::uint8_t>(y), run.threads);
      },
      "float32 to int8");
  return y;
}

Value plain(Op& op, const Value& x) { return op.view(x, shape_in_memory(x)); }

Value as_bytes(Op& op, const Value& plain, const Shape& shape, ByteScale scale) {
  Value found = op.view(plain, shape);
  found.scale = scale;
  return found;
}

Value mean_of_images(Op& op, const Value& x) {
  const Images of(x);
  const Value y = op.make(Dtype::kFloat32, {of.n, of.channels});
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const std::uint8_t* in = run.in<std::uint8_t>(x);
        float* out = run.out<float>(y);
        const float factor = x.scale.scale / static_cast<float>(of.pixels);
        spread(run.threads, of.n, of.values(), [&](std::int64_t begin, std::int64_t end) {
          std::vector<std::int64_t> sums(of.channels);
          for (std::int64_t i = begin; i < end; ++i) {
            std::fill(sums.begin(), sums.end(), -of.pixels * x.scale.zero);
            const std::uint8_t* image = in + i * of.values();
            for (std::int64_t k = 0; k < of.pixels; ++k, image += of.channels)
              for (std::int64_t c = 0; c < of.channels; ++c) sums[c] += image[c];
            for (std::int64_t c = 0; c < of.channels; ++c)
              out[i * of.channels + c] = static_cast<float>(sums[c]) * factor;
          }
        });
      },
      kStatic);
  return y;
}

Value looked_up(Op& op, const Value& x, ByteScale scale, const Table& table) {
  const Value y = op.make_bytes(x.shape, scale);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const std::uint8_t* in = run.in<std::uint8_t>(x);
        std::uint8_t* out = run.out<std::uint8_t>(y);
        spread(run.threads, x.count(), 1, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i) out[i] = table[in[i]];
        });
      },
      kStatic, x);
  return y;
}

}  // namespace subbyte::runtime
