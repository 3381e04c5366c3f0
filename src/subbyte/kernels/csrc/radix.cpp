#include "radix.hpp"

#include <algorithm>
#include <cstring>

#include "sizes.hpp"

namespace subbyte {
namespace {

// Levels 0 means "known at run time only": the same loops, with a real division.
template <unsigned Levels>
void pack_words(const std::uint8_t* codes, std::size_t count, unsigned levels, unsigned digits,
                std::uint8_t* words) {
  const std::uint64_t base = Levels ? Levels : levels;
  for (std::size_t start = 0; start < count; start += digits, words += 8) {
    const std::size_t stop = std::min<std::size_t>(count, start + digits);
    std::uint64_t word = 0;
    for (std::size_t i = stop; i-- > start;) word = word * base + codes[i];
    std::memcpy(words, &word, 8);
  }
}

template <unsigned Levels>
void unpack_words(const std::uint8_t* words, std::size_t count, unsigned levels, unsigned digits,
                  std::uint8_t* codes) {
  const std::uint64_t base = Levels ? Levels : levels;
  for (std::size_t start = 0; start < count; start += digits, words += 8) {
    const std::size_t stop = std::min<std::size_t>(count, start + digits);
    std::uint64_t word;
    std::memcpy(&word, words, 8);
    for (std::size_t i = start; i < stop; ++i) {
      codes[i] = static_cast<std::uint8_t>(word % base);
      word /= base;
    }
  }
}

// Calls the instance for a common level count (a constant divisor is a multiplication).
#define SUBBYTE_DISPATCH(function, levels, ...) \
  switch (levels) {                             \
    case 2:                                     \
      return function<2>(__VA_ARGS__);          \
    case 3:                                     \
      return function<3>(__VA_ARGS__);          \
    case 4:                                     \
      return function<4>(__VA_ARGS__);          \
    case 5:                                     \
      return function<5>(__VA_ARGS__);          \
    case 7:                                     \
      return function<7>(__VA_ARGS__);          \
    case 8:                                     \
      return function<8>(__VA_ARGS__);          \
    case 9:                                     \
      return function<9>(__VA_ARGS__);          \
    case 15:                                    \
      return function<15>(__VA_ARGS__);         \
    case 16:                                    \
      return function<16>(__VA_ARGS__);         \
    case 17:                                    \
      return function<17>(__VA_ARGS__);         \
    default:                                    \
      return function<0>(__VA_ARGS__);          \
  }

}  // namespace

void check_radix(unsigned levels, unsigned digits) {
  require(levels >= 2 && levels <= 256, "levels must be 2 to 256");
  unsigned most = 0;
  for (std::uint64_t rest = ~std::uint64_t{0}; rest >= levels - 1; ++most)
    rest = (rest - (levels - 1)) / levels;
  require(digits == most, "digits must be the most that fit in a 64-bit word");
}

void radix_pack(const std::uint8_t* codes, std::size_t count, unsigned levels, unsigned digits,
                std::uint8_t* words) {
  SUBBYTE_DISPATCH(pack_words, levels, codes, count, levels, digits, words)
}

void radix_unpack(const std::uint8_t* words, std::size_t count, unsigned levels, unsigned digits,
                  std::uint8_t* codes) {
  SUBBYTE_DISPATCH(unpack_words, levels, words, count, levels, digits, codes)
}

void radix_unpack_range(const std::uint8_t* words, std::size_t start, std::size_t count,
                        unsigned levels, unsigned digits, std::uint8_t* codes) {
  const std::size_t skip = start % digits;
  words += 8 * (start / digits);
  if (skip) {
    std::uint8_t first[64];
    const std::size_t n = std::min<std::size_t>(count, digits - skip);
    radix_unpack(words, skip + n, levels, digits, first);
    std::memcpy(codes, first + skip, n);
    codes += n, count -= n, words += 8;
  }
  radix_unpack(words, count, levels, digits, codes);
}

}  // namespace subbyte
