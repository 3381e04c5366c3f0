#include "origin.hpp"

#include <algorithm>
#include <cstring>

namespace subbyte {
namespace {

constexpr std::size_t kBlock = 256;
constexpr std::size_t kGlance = 4;  // blocks looked at in a call

}  // namespace

Origin::Origin(const std::uint8_t* data, std::size_t bytes) : data_(data), bytes_(bytes) {
  sums_.resize((bytes + kBlock - 1) / kBlock);
  for (std::size_t i = 0; i < sums_.size(); ++i) sums_[i] = sum(data, i);
}

// Words times odd numbers, every word another one.
std::uint64_t Origin::sum(const std::uint8_t* data, std::size_t block) const {
  constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15;
  const std::size_t first = block * kBlock, stop = std::min(bytes_, first + kBlock);
  std::uint64_t total = 0, factor = kOdd, word;
  std::size_t i = first;
  for (; i + 8 <= stop; i += 8, factor += 2 * kOdd) {
    std::memcpy(&word, data + i, 8);
    total += word * factor;
  }
  if (i == stop) return total;
  word = 0;
  std::memcpy(&word, data + i, stop - i);
  return total + word * factor;
}

bool Origin::same(const std::uint8_t* data, std::size_t bytes) const {
  if (bytes != bytes_) return false;
  for (std::size_t i = 0; i < sums_.size(); ++i)
    if (sum(data, i) != sums_[i]) return false;
  return true;
}

bool Origin::glance(const std::uint8_t* data, std::size_t bytes) const {
  if (data != data_ || bytes != bytes_) return false;
  const std::size_t step = (sums_.size() + kGlance - 1) / kGlance;
  if (step == 0) return true;
  const std::size_t turn = step == 1 ? 0 : turn_.fetch_add(1, std::memory_order_relaxed) % step;
  for (std::size_t i = turn; i < sums_.size(); i += step)
    if (sum(data, i) != sums_[i]) return false;
  return true;
}

}  // namespace subbyte
