// What the machine itself gives: the rates that no kernel can beat.
#pragma once

#include <cstdint>
#include <string>

#include "memory.hpp"

namespace subbyte {

// Dot products of the tier's own instructions on bytes, from register to register.
// Returns the multiply-adds done by all threads together. rounds: 1 to 2^30. Throws
// std::invalid_argument for other numbers, and for a tier that this machine lacks.
std::int64_t spin_int8(const std::string& tier, std::int64_t rounds, int threads);

// Fused multiply-adds of float32 with the widest vectors of this CPU, likewise.
std::int64_t spin_float(std::int64_t rounds, int threads);

// Memory to be read from the first to the last byte, a contiguous part for each thread: 128 bytes
// to 4 GB. Throws std::invalid_argument for other sizes, and where a call would read more than 2^42
// bytes or nothing.
class Stream {
 public:
  explicit Stream(std::size_t bytes);
  // Reads all of it `passes` times; returns the bytes read.
  std::int64_t read(int passes, int threads) const;

 private:
  Buffer buffer_;
  std::size_t bytes_;
};

}  // namespace subbyte
