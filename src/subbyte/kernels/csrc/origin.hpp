// What a panel was made of: enough of it to notice that it has changed.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace subbyte {

// Bytes that others may write to, known by a sum of every block of 256. A sum differs whenever one
// 8-byte word of its block does; of several that change together, 1 in 2^64 goes unnoticed.
class Origin {
 public:
  Origin(const std::uint8_t* data, std::size_t bytes);

  // Whether the bytes are still the same: all of them.
  bool same(const std::uint8_t* data, std::size_t bytes) const;
  // The same for bytes that still lie where they lay, from a few blocks that are spread over them:
  // at every call others, all of them in turn.
  bool glance(const std::uint8_t* data, std::size_t bytes) const;

 private:
  std::uint64_t sum(const std::uint8_t* data, std::size_t block) const;

  const std::uint8_t* data_;  // never read
  std::size_t bytes_;
  std::vector<std::uint64_t> sums_;
  mutable std::atomic<std::uint32_t> turn_{0};
};

}  // namespace subbyte
