// Sizes that come from outside.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace subbyte {

// What `what` says of sizes that are wrong is a std::invalid_argument: a ValueError in Python.
inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// Of factors that are not negative. Throws std::invalid_argument if it does not fit.
inline std::int64_t product(std::initializer_list<std::int64_t> factors) {
  std::int64_t total = 1;
  for (const std::int64_t factor : factors)
    require(factor >= 0 && !__builtin_mul_overflow(total, factor, &total), "sizes are too large");
  return total;
}

}  // namespace subbyte
