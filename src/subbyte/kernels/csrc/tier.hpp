// What every tier's file includes before it switches its instructions on: nothing of the standard
// library may be compiled for them, or another tier could be linked to it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.hpp"

namespace subbyte {

inline float float_of(std::int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Whether 127 / x is finite and x / 127 normal, for a positive x given by its bits.
inline bool is_scalable(std::int32_t bits) { return bits < 0x7F800000 && bits > 0x05000000; }

}  // namespace subbyte
