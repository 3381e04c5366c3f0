#include "tensor.hpp"

#include "error.hpp"

namespace subbyte::runtime {
namespace {

constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16", "int64",
                                  "int32",   "int16",   "int8",    "uint8",    "bool"};
constexpr const char* kStored[] = {"F32", "F64", "F16", "BF16", "I64",
                                   "I32", "I16", "I8",  "U8",   "BOOL"};

}  // namespace

const char* name_of(Dtype dtype) { return kNames[static_cast<int>(dtype)]; }

Dtype dtype_named(const std::string& name) {
  for (int i = 0; i < 10; ++i)
    if (name == kNames[i] || name == kStored[i]) return static_cast<Dtype>(i);
  throw Error("type '" + shown(name) + "' is unknown");
}

std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size() && i < 12; ++i)
    text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::int64_t count_of(const Shape& shape) {
  constexpr std::int64_t kMost = std::int64_t{1} << 40;
  std::int64_t most = 1;  // as if sizes of 0 were 1: strides must fit, too
  bool empty = false;
  for (const std::int64_t size : shape) {
    empty |= size == 0;
    if (size < 0 || __builtin_mul_overflow(most, size ? size : 1, &most) || most > kMost)
      throw Error("a tensor cannot be of shape " + text_of(shape));
  }
  return empty ? 0 : most;
}

}  // namespace subbyte::runtime
