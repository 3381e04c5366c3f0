// Activations that stay in 8 bits between layers.
#pragma once

#include <array>

#include "op.hpp"

namespace subbyte::runtime {

// Sizes as they lie in memory: four dimensions as N H W C.
Shape shape_in_memory(const Value& x);
// The dimension of `shape_in_memory` that is this one of `shape`.
int axis_in_memory(const Value& x, int axis);

// bytes to y, N C H W. NaN cannot be.
void floats_from_bytes(const Value& bytes, const Value& y, const Run& run);
// As `from`, N C H W, to bytes `to` of `like`, for so many images; NaN becomes the smallest value.
void bytes_from_floats(const float* from, std::int64_t images, const Value& like, std::uint8_t* to,
                       int threads);

// x in bytes, as a step.
Value to_bytes(Op& op, const Value& x, ByteScale scale);
// Bytes as a plain tensor of `shape_in_memory`, and back, of the same memory.
Value plain(Op& op, const Value& x);
Value as_bytes(Op& op, const Value& plain, const Shape& shape, ByteScale scale);

// round(value / scale) + zero, ties to even, moved into what bytes hold.
std::uint8_t rounded(float value, float inverse, ByteScale scale);
using Table = std::array<std::uint8_t, 256>;
// Every byte of x's scale as its function's byte.
template <class F>
Table table_of(ByteScale from, ByteScale to, F&& f) {
  Table table{};
  for (int byte = 0; byte < 256; ++byte)
    table[byte] =
        rounded(f(static_cast<float>(byte - from.zero) * from.scale), 1.0f / to.scale, to);
  return table;
}
// y[i] = table[x[i]], as a step.
Value looked_up(Op& op, const Value& x, ByteScale scale, const Table& table);

// The mean over the pixels of images in bytes, float32 [n, c]: the sum of byte - zero, which is
// exact, times (scale / pixels).
Value mean_of_images(Op& op, const Value& x);

constexpr char kStatic[] = "int8, static scales";

}  // namespace subbyte::runtime
