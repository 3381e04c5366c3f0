// NumPy's .npy files, version 1 to 3, little-endian, in C order.
#pragma once

#include <string>

#include "memory.hpp"
#include "tensor.hpp"

namespace subbyte::runtime {

struct Npy {
  Dtype dtype;
  Shape shape;
  Buffer data;
};

Npy empty_npy(Dtype dtype, const Shape& shape);
// Throw Error naming the file.
Npy read_npy(const std::string& path);
void write_npy(const std::string& path, const Npy& array);

}  // namespace subbyte::runtime
