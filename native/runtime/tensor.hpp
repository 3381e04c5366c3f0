// Types, shapes, and tensors that lie in memory without gaps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace subbyte::runtime {

enum class Dtype : std::uint8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUint8,
  kBool
};

using Shape = std::vector<std::int64_t>;

constexpr std::size_t size_of(Dtype dtype) {
  constexpr std::size_t kSizes[] = {4, 8, 2, 2, 8, 4, 2, 1, 1, 1};
  return kSizes[static_cast<int>(dtype)];
}

const char* name_of(Dtype dtype);  // "float32"
// By PyTorch's name ("float32"), or safetensors' ("F32"). Throws Error for others.
Dtype dtype_named(const std::string& name);
std::string text_of(const Shape& shape);  // "[2, 3]"

// Values of a tensor; throws Error if a size is negative, or all of them are over 2^40.
std::int64_t count_of(const Shape& shape);

struct Tensor {
  Dtype dtype = Dtype::kFloat32;
  Shape shape;
  const std::uint8_t* data = nullptr;
  std::size_t bytes = 0;
};

}  // namespace subbyte::runtime
